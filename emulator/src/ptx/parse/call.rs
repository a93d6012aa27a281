//! Functions that kernels call: each call reads the function's body anew, in place, so that lanes part and meet in it as anywhere.

use std::sync::Arc;

use super::Parser;
use crate::counts::Class;
use crate::ptx::instruction::{Instruction, Op, Pred};
use crate::ptx::scope::{Builder, Operand};
use crate::ptx::token::Token;
use crate::ptx::{CALL_PARAMS, ParseError};

/// A function that kernels call: its body is read anew into each that does.
#[derive(Clone)]
pub(super) struct Function {
    results: Vec<String>,
    params: Vec<String>,
    /// The place of its first statement; none where only its name is declared.
    body: Option<usize>,
}

impl Parser<'_> {
    /// Functions may be called before their place in the text.
    pub(super) fn find_functions(&mut self) -> Result<(), ParseError> {
        for at in 0..self.tokens.len() {
            if self.tokens[at].token == Token::Word(".func") {
                self.at = at + 1;
                let (name, function) = self.function()?;
                let known = self.functions.get(&name).is_some_and(|function| function.body.is_some());
                if !known {
                    self.functions.insert(name, function);
                }
            }
        }
        self.at = 0;
        Ok(())
    }

    /// A function after `.func`, its body passed over.
    pub(super) fn function(&mut self) -> Result<(String, Function), ParseError> {
        let results = if self.accept('(') { self.names_of_params()? } else { Vec::new() };
        let name = self.word()?.to_owned();
        let params = if self.accept('(') { self.names_of_params()? } else { Vec::new() };
        while !(self.accept(';') || self.accept('{')) {
            self.next()?;
        }
        let body = (self.tokens[self.at - 1].token == Token::Mark('{')).then_some(self.at);
        let mut depth = usize::from(body.is_some());
        while depth > 0 {
            match self.next()? {
                Token::Mark('{') => depth += 1,
                Token::Mark('}') => depth -= 1,
                _ => {}
            }
        }
        Ok((name, Function { results, params, body }))
    }

    fn names_of_params(&mut self) -> Result<Vec<String>, ParseError> {
        let mut names = Vec::new();
        if self.accept(')') {
            return Ok(names);
        }
        loop {
            names.push(self.param_of()?.0.to_owned());
            if !self.accept(',') {
                self.expect(')')?;
                return Ok(names);
            }
        }
    }

    /// `call (result), function, (arguments);` after `call`: the function's body, read in place.
    pub(super) fn call(&mut self, builder: &mut Builder, guard: Option<Pred>, line: u32) -> Result<(), ParseError> {
        let start = self.at - 1;
        let results = if self.accept('(') { self.arguments(builder)? } else { Vec::new() };
        self.accept(',');
        let name = self.word()?.to_owned();
        let params = if self.accept(',') && self.accept('(') { self.arguments(builder)? } else { Vec::new() };
        let wrong = |message: String| ParseError { line, message };
        if self.accept(',') {
            return Err(wrong(format!(
                "a call of a function by its address, in {name}, is not known to the emulated device"
            )));
        }
        self.expect(';')?;
        let Some(function) = self.functions.get(&name).cloned() else {
            return Err(wrong(format!(
                "a call of {name}, which is no function of this module, is not known to the emulated device"
            )));
        };
        let text: Arc<str> = self.text(start).into();
        let source = self.source;
        let class = Class::Branch;
        let Some(body) = function.body else {
            if name != "__assertfail" {
                return Err(wrong(format!("a call of {name}, which has no body, is not known to the emulated device")));
            }
            builder.code.push(Instruction { op: Op::Trap, guard, class, line, source, text, names: Arc::default() });
            return Ok(());
        };
        if function.params.len() != params.len() || function.results.len() != results.len() {
            return Err(wrong(format!("{name} takes {} arguments", function.params.len())));
        }
        let over = format!("over {}", builder.calls_read());
        if let Some(guard) = guard {
            builder.jump(&over);
            let guard = Some(Pred { negated: !guard.negated, ..guard });
            builder.code.push(Instruction {
                op: Op::Branch { to: 0 },
                guard,
                class,
                line,
                source,
                text,
                names: Arc::default(),
            });
        }
        let names = function.params.into_iter().chain(function.results);
        let bound: Vec<_> = names.zip(params.into_iter().chain(results)).collect();
        builder.enter_call(&name, &bound).map_err(wrong)?;
        let after = std::mem::replace(&mut self.at, body);
        self.body(builder)?;
        self.at = after;
        self.source = source;
        builder.leave_call();
        builder.label(&over);
        Ok(())
    }

    /// Addresses of the arguments of a call.
    fn arguments(&mut self, builder: &mut Builder) -> Result<Vec<u64>, ParseError> {
        let mut out = Vec::new();
        while !self.accept(')') {
            let name = self.word()?;
            match builder.operand(name) {
                Some(Operand::Bits(address)) if address >= CALL_PARAMS => out.push(address),
                _ => return self.fail(format!("{name} is not a .param variable")),
            }
            self.accept(',');
        }
        Ok(out)
    }
}
