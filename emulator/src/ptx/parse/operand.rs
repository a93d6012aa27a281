//! Operands: registers, constants, vectors, addresses.

use super::Parser;
use crate::ptx::ParseError;
use crate::ptx::instruction::Pred;
use crate::ptx::scope::{Builder, Operand};
use crate::ptx::token::Token;

impl Parser<'_> {
    pub(super) fn operand(&mut self, builder: &mut Builder) -> Result<Operand, ParseError> {
        let operand = self.single_operand(builder)?;
        if self.accept('|') {
            let other = self.single_operand(builder)?;
            return Ok(Operand::Pair(Box::new(operand), Box::new(other)));
        }
        Ok(operand)
    }

    fn single_operand(&mut self, builder: &mut Builder) -> Result<Operand, ParseError> {
        Ok(match self.next()? {
            Token::Int(value) | Token::F64(value) => Operand::Bits(value),
            Token::F32(value) => Operand::Bits(u64::from(value)),
            Token::Mark('-') => Operand::Bits(self.int()?.wrapping_neg()),
            Token::Mark('!') => {
                let name = self.word()?;
                match builder.operand(name) {
                    Some(Operand::Pred(pred)) => Operand::Pred(Pred { negated: true, ..pred }),
                    _ => return self.fail(format!("{name} is not a predicate")),
                }
            }
            Token::Mark('{') => {
                let mut parts = Vec::new();
                while !self.accept('}') {
                    parts.push(self.single_operand(builder)?);
                    self.accept(',');
                }
                Operand::Vector(parts)
            }
            Token::Mark('[') => self.address(builder)?,
            Token::Word("_") => Operand::Sink,
            Token::Word("WARP_SZ") => Operand::Bits(32),
            Token::Word(name) => match builder.operand(name) {
                Some(operand) => operand,
                None if self.module.variables.contains_key(name) => {
                    Operand::Reg { number: builder.module_variable(name), bytes: 8 }
                }
                None => Operand::Label(name.to_owned()),
            },
            other => return self.fail(format!("{other:?} is not an operand")),
        })
    }

    fn address(&mut self, builder: &mut Builder) -> Result<Operand, ParseError> {
        let (base, mut offset) = match self.single_operand(builder)? {
            Operand::Reg { number, .. } => (number, 0),
            Operand::Bits(address) => (builder.constant(0), address as i64),
            other => return self.fail(format!("{other:?} is not an address")),
        };
        while !self.accept(']') {
            // `+4`, `+-4` or `-4`.
            let plus = self.accept('+');
            let negative = self.accept('-');
            if !plus && !negative {
                return self.fail("expected an offset");
            }
            let value = self.int()? as i64;
            offset += if negative { value.wrapping_neg() } else { value };
        }
        Ok(Operand::Address { base, offset })
    }
}
