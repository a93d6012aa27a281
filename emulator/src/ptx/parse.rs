//! From words to modules, kernels and instructions.

mod call;
mod operand;

use std::collections::HashMap;
use std::sync::Arc;

use self::call::Function;
use super::decode::{Opcode, decode};
use super::instruction::{Instruction, Op, Pred};
use super::scope::{Builder, Operand, RETURN};
use super::token::{Placed, Token, error, split};
use super::{Kernel, Module, ParseError, Variable};

struct Parser<'a> {
    tokens: Vec<Placed<'a>>,
    at: usize,
    module: Module,
    files: HashMap<u32, String>,
    functions: HashMap<String, Function>,
    /// Shared variables of the module: name, bytes (none: dynamic), alignment.
    shared: Vec<(String, Option<usize>, usize)>,
    /// File and line of the source of the next instruction.
    source: (u32, u32),
}

/// A declared variable.
struct Declared {
    name: String,
    variable: Variable,
    unsized_array: bool,
}

pub(super) fn module(text: &str) -> Result<Module, ParseError> {
    let tokens = split(text)?;
    let mut parser = Parser {
        tokens,
        at: 0,
        module: Module::default(),
        files: HashMap::new(),
        functions: HashMap::new(),
        shared: Vec::new(),
        source: (0, 0),
    };
    parser.find_functions()?;
    while parser.at < parser.tokens.len() {
        parser.top_level()?;
    }
    parser.module.files = Arc::new(parser.files);
    Ok(parser.module)
}

/// Bytes of a value of a type; 0 for predicates.
pub(super) fn type_bytes(name: &str) -> Option<usize> {
    Some(match name {
        "pred" => 0,
        "u8" | "s8" | "b8" => 1,
        "u16" | "s16" | "b16" | "f16" | "bf16" => 2,
        "u32" | "s32" | "b32" | "f32" | "f16x2" | "bf16x2" | "tf32" => 4,
        "u64" | "s64" | "b64" | "f64" => 8,
        "b128" => 16,
        _ => return None,
    })
}

impl<'a> Parser<'a> {
    fn line(&self) -> u32 {
        self.tokens.get(self.at.min(self.tokens.len().saturating_sub(1))).map_or(0, |placed| placed.line)
    }

    fn fail<T>(&self, message: impl Into<String>) -> Result<T, ParseError> {
        Err(ParseError { line: self.line(), message: message.into() })
    }

    fn peek(&self) -> Option<&Token<'a>> {
        self.tokens.get(self.at).map(|placed| &placed.token)
    }

    fn next(&mut self) -> Result<Token<'a>, ParseError> {
        let token = self.peek().cloned();
        self.at += 1;
        token.ok_or_else(|| error(self.line(), "the text ends too early"))
    }

    fn accept(&mut self, mark: char) -> bool {
        let found = self.peek() == Some(&Token::Mark(mark));
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, mark: char) -> Result<(), ParseError> {
        if self.accept(mark) {
            return Ok(());
        }
        let found = format!("expected {mark:?}, found {:?}", self.peek());
        self.fail(found)
    }

    fn word(&mut self) -> Result<&'a str, ParseError> {
        match self.next()? {
            Token::Word(word) => Ok(word),
            other => self.fail(format!("expected a name, found {other:?}")),
        }
    }

    fn int(&mut self) -> Result<u64, ParseError> {
        match self.next()? {
            Token::Int(value) => Ok(value),
            other => self.fail(format!("expected a whole number, found {other:?}")),
        }
    }

    fn skip_to(&mut self, mark: char) -> Result<(), ParseError> {
        while self.next()? != Token::Mark(mark) {}
        Ok(())
    }

    fn top_level(&mut self) -> Result<(), ParseError> {
        match self.word()? {
            ".version" | ".address_size" => self.next().map(drop),
            ".target" => {
                self.next()?;
                while self.accept(',') {
                    self.next()?;
                }
                Ok(())
            }
            ".file" => self.file(),
            ".section" => {
                self.next()?;
                self.expect('{')?;
                self.skip_to('}')
            }
            ".pragma" => self.skip_to(';'),
            ".visible" | ".extern" | ".weak" | ".common" => Ok(()),
            ".entry" => self.kernel(),
            space @ (".global" | ".const") => {
                for declared in self.variables(space)? {
                    self.module.variables.insert(declared.name, declared.variable);
                }
                Ok(())
            }
            ".shared" => {
                for declared in self.variables(".shared")? {
                    let bytes = (!declared.unsized_array).then_some(declared.variable.bytes);
                    self.shared.push((declared.name, bytes, declared.variable.align));
                }
                Ok(())
            }
            ".func" => self.function().map(drop),
            other => self.fail(format!("{other} is not known to the emulated device")),
        }
    }

    /// Statements up to the end of the braces.
    fn body(&mut self, builder: &mut Builder) -> Result<(), ParseError> {
        let mut depth = 1;
        while depth > 0 {
            if self.accept('{') {
                depth += 1;
                builder.enter();
            } else if self.accept('}') {
                depth -= 1;
                if depth > 0 {
                    builder.leave();
                }
            } else {
                self.statement(builder)?;
            }
        }
        Ok(())
    }

    fn file(&mut self) -> Result<(), ParseError> {
        let number = self.int()? as u32;
        let Token::Text(path) = self.next()? else { return self.fail("expected the name of a file") };
        let name = path.rsplit(['/', '\\']).next().unwrap_or(path);
        self.files.insert(number, name.to_owned());
        while self.accept(',') {
            self.next()?;
        }
        Ok(())
    }

    /// `.align 16 .b8 name[64] = {..}, other;` after the space.
    fn variables(&mut self, space: &str) -> Result<Vec<Declared>, ParseError> {
        let (mut align, mut element) = (0, None);
        let mut first = None;
        while first.is_none() {
            match self.word()? {
                ".align" => align = self.int()? as usize,
                ".attribute" => self.skip_to(')')?,
                word => match word.strip_prefix('.').and_then(type_bytes) {
                    Some(bytes) => element = Some(bytes),
                    None if element.is_some() => first = Some(word),
                    None => return self.fail(format!("{word} is not a type of {space} variables")),
                },
            }
        }
        let element = element.unwrap_or(1);
        let mut out = Vec::new();
        let mut name = first.unwrap_or_default();
        loop {
            let (mut bytes, mut unsized_array) = (element, false);
            while self.accept('[') {
                unsized_array = self.accept(']');
                if !unsized_array {
                    bytes *= self.int()? as usize;
                    self.expect(']')?;
                }
            }
            let initial = if self.accept('=') { self.initial(element)? } else { Vec::new() };
            let variable = Variable { align: align.max(element), bytes, initial };
            out.push(Declared { name: name.to_owned(), variable, unsized_array });
            if !self.accept(',') {
                self.expect(';')?;
                return Ok(out);
            }
            name = self.word()?;
        }
    }

    fn initial(&mut self, element: usize) -> Result<Vec<u8>, ParseError> {
        let (mut bytes, mut depth) = (Vec::new(), 0);
        loop {
            let negative = self.accept('-');
            let value = match self.next()? {
                Token::Mark('{') => {
                    depth += 1;
                    continue;
                }
                Token::Mark('}') => {
                    depth -= 1;
                    if depth == 0 {
                        return Ok(bytes);
                    }
                    continue;
                }
                Token::Mark(',') => continue,
                Token::Int(value) if negative => value.wrapping_neg(),
                Token::Int(value) | Token::F64(value) => value,
                Token::F32(value) => u64::from(value),
                other => return self.fail(format!("{other:?} cannot start a variable")),
            };
            bytes.extend_from_slice(&value.to_le_bytes()[..element]);
            if depth == 0 {
                return Ok(bytes);
            }
        }
    }

    fn kernel(&mut self) -> Result<(), ParseError> {
        let name = self.word()?;
        let mut builder = Builder::new();
        for (name, bytes, align) in &self.shared {
            match bytes {
                Some(bytes) => builder.declare_shared(name, *bytes, *align),
                None => builder.declare_dynamic_shared(name, *align),
            }
        }
        if self.accept('(') && !self.accept(')') {
            loop {
                self.param(&mut builder)?;
                if !self.accept(',') {
                    self.expect(')')?;
                    break;
                }
            }
        }
        self.limits(&mut builder)?;
        if self.accept(';') {
            return Ok(());
        }
        self.expect('{')?;
        self.body(&mut builder)?;
        let line = self.line();
        let exit = Instruction {
            op: Op::Exit,
            guard: None,
            class: crate::counts::Class::Branch,
            line,
            source: self.source,
            text: "end of the kernel".into(),
            names: Arc::default(),
        };
        builder.code.push(exit);
        let kernel: Kernel = builder.finish(name).map_err(|message| ParseError { line, message })?;
        self.module.kernels.insert(name.to_owned(), Arc::new(kernel));
        Ok(())
    }

    fn param(&mut self, builder: &mut Builder) -> Result<(), ParseError> {
        let (name, size, align) = self.param_of()?;
        builder.declare_param(name, size, align);
        Ok(())
    }

    /// Name, bytes and alignment of `.param .align 8 .b8 name[16]`.
    fn param_of(&mut self) -> Result<(&'a str, usize, usize), ParseError> {
        self.word()?;
        let (mut align, mut bytes) = (0, 0);
        loop {
            match self.word()? {
                ".align" => align = self.int()? as usize,
                ".ptr" | ".global" | ".const" | ".shared" => {}
                word => match word.strip_prefix('.').and_then(type_bytes) {
                    Some(size) => bytes = size,
                    None => {
                        let mut size = bytes;
                        if self.accept('[') {
                            size *= self.int()? as usize;
                            self.expect(']')?;
                        }
                        return Ok((word, size, align.max(bytes)));
                    }
                },
            }
        }
    }

    /// `.maxntid 256, 1, 1` and the like, before the body.
    fn limits(&mut self, builder: &mut Builder) -> Result<(), ParseError> {
        while let Some(Token::Word(word)) = self.peek().cloned() {
            self.at += 1;
            let mut values = Vec::new();
            while let Some(&Token::Int(value)) = self.peek() {
                self.at += 1;
                values.push(value);
                self.accept(',');
            }
            if let ".maxntid" | ".reqntid" = word {
                builder.max_threads = values.iter().product::<u64>() as u32;
            }
        }
        Ok(())
    }

    fn statement(&mut self, builder: &mut Builder) -> Result<(), ParseError> {
        if self.accept(';') {
            return Ok(());
        }
        let start = self.at;
        let line = self.line();
        let guard = if self.accept('@') {
            let negated = self.accept('!');
            let name = self.word()?;
            match builder.operand(name) {
                Some(Operand::Pred(pred)) => Some(Pred { negated, ..pred }),
                _ => return self.fail(format!("{name} is not a predicate")),
            }
        } else {
            None
        };
        let word = self.word()?;
        match word {
            ".reg" => return self.registers(builder),
            ".loc" => return self.location(),
            ".pragma" => return self.skip_to(';'),
            ".shared" | ".local" | ".param" => {
                for declared in self.variables(word)? {
                    let Variable { bytes, align, .. } = declared.variable;
                    match word {
                        ".shared" => builder.declare_shared(&declared.name, bytes, align),
                        ".local" => builder.declare_local(&declared.name, bytes, align),
                        _ => builder.declare_call_param(&declared.name, bytes, align),
                    }
                }
                return Ok(());
            }
            _ => {}
        }
        if self.accept(':') {
            if self.peek() == Some(&Token::Word(".branchtargets")) {
                self.at += 1;
                let mut labels = vec![self.word()?.to_owned()];
                while self.accept(',') {
                    labels.push(self.word()?.to_owned());
                }
                builder.table(word, labels);
                return self.expect(';');
            }
            builder.label(word);
            return Ok(());
        }
        if word == "call" || word == "call.uni" {
            return self.call(builder, guard, line);
        }
        let mut operands = Vec::new();
        while !self.accept(';') {
            operands.push(self.operand(builder)?);
            self.accept(',');
        }
        let opcode = Opcode::new(word);
        match (opcode.base, &operands[..]) {
            ("bra", [Operand::Label(label)]) => builder.jump(label),
            ("brx", [_, Operand::Label(table)]) => builder.jump_by(table),
            ("ret", _) if builder.in_call() => builder.jump(RETURN),
            _ => {}
        }
        let text: Arc<str> = self.text(start).into();
        let ops = decode(&opcode, &operands, builder)
            .map_err(|message| ParseError { line, message: format!("{message}: `{text}`") })?;
        let mut names = Vec::new();
        operands.iter().for_each(|operand| operand.names(&mut names));
        let names: Arc<[u32]> = names.into();
        for (op, class) in ops {
            let (source, text, names) = (self.source, Arc::clone(&text), Arc::clone(&names));
            builder.code.push(Instruction { op, guard, class, line, source, text, names });
        }
        Ok(())
    }

    /// The words from `start` to here, for messages.
    fn text(&self, start: usize) -> String {
        let mut out = String::new();
        for placed in &self.tokens[start..self.at.saturating_sub(1)] {
            match &placed.token {
                Token::Word(word) if out.is_empty() || out.ends_with(['[', '{', '@', '!', '-', '+', '|']) => {
                    out.push_str(word);
                }
                Token::Word(word) => {
                    out.push(' ');
                    out.push_str(word);
                }
                Token::Int(value) => out.push_str(&format!("{}{value}", if out.ends_with(',') { " " } else { "" })),
                Token::F32(bits) => out.push_str(&format!(" {:?}", f32::from_bits(*bits))),
                Token::F64(bits) => out.push_str(&format!(" {:?}", f64::from_bits(*bits))),
                Token::Text(text) => out.push_str(text),
                Token::Mark(mark @ ('[' | '{')) if out.ends_with(',') => {
                    out.push(' ');
                    out.push(*mark);
                }
                Token::Mark(mark) => out.push(*mark),
            }
        }
        out
    }

    fn registers(&mut self, builder: &mut Builder) -> Result<(), ParseError> {
        let ty = self.word()?;
        let Some(bytes) = ty.strip_prefix('.').and_then(type_bytes) else {
            return self.fail(format!("{ty} is not a type of registers"));
        };
        loop {
            let name = self.word()?;
            let count = if self.accept('<') {
                let count = self.int()? as u32;
                self.expect('>')?;
                Some(count)
            } else {
                None
            };
            builder.declare(name, count, bytes as u8);
            if !self.accept(',') {
                return self.expect(';');
            }
        }
    }

    /// `.loc 1 30 5`, perhaps with the function that was inlined there: the place of the next instructions.
    fn location(&mut self) -> Result<(), ParseError> {
        self.source = (self.int()? as u32, self.int()? as u32);
        self.int()?;
        while self.accept(',') {
            match self.word()? {
                "function_name" => {
                    self.word()?;
                    if self.accept('+') {
                        self.int()?;
                    }
                }
                "inlined_at" => {
                    for _ in 0..3 {
                        self.int()?;
                    }
                }
                other => return self.fail(format!("{other} in .loc")),
            }
        }
        Ok(())
    }
}
