//! Words of PTX.

use super::ParseError;

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token<'a> {
    /// Names, directives, opcodes with their modifiers, registers.
    Word(&'a str),
    /// Whole numbers as bits, or floats by their bits.
    Int(u64),
    F32(u32),
    F64(u64),
    Text(&'a str),
    Mark(char),
}

#[derive(Clone, Debug)]
pub(super) struct Placed<'a> {
    pub token: Token<'a>,
    pub line: u32,
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$' | b'%' | b'.')
}

/// Splits the text, without comments.
pub(super) fn split(text: &str) -> Result<Vec<Placed<'_>>, ParseError> {
    let bytes = text.as_bytes();
    let (mut at, mut line) = (0, 1);
    let mut out = Vec::with_capacity(bytes.len() / 4);
    while at < bytes.len() {
        let start = at;
        match bytes[at] {
            b'\n' => {
                line += 1;
                at += 1;
            }
            byte if byte.is_ascii_whitespace() || byte == 0 => at += 1,
            b'/' if bytes.get(at + 1) == Some(&b'/') => at += bytes[at..].iter().take_while(|&&b| b != b'\n').count(),
            b'/' if bytes.get(at + 1) == Some(&b'*') => {
                let length = text[at..].find("*/").unwrap_or(text.len() - at - 2) + 2;
                line += text[at..at + length].matches('\n').count() as u32;
                at += length;
            }
            b'"' => {
                let length = text[at + 1..].find('"').ok_or_else(|| error(line, "a text without an end"))?;
                out.push(Placed { token: Token::Text(&text[at + 1..at + 1 + length]), line });
                at += length + 2;
            }
            byte if byte.is_ascii_digit() => {
                at += bytes[at..].iter().take_while(|&&b| is_word(b)).count();
                out.push(Placed { token: number(&text[start..at], line)?, line });
            }
            byte if is_word(byte) => {
                at += bytes[at..].iter().take_while(|&&b| is_word(b)).count();
                // `opcode::modifier`, as in `ld.global.L2::128B`.
                while bytes[at..].starts_with(b"::") {
                    at += 2;
                    at += bytes[at..].iter().take_while(|&&b| is_word(b)).count();
                }
                out.push(Placed { token: Token::Word(&text[start..at]), line });
            }
            byte => {
                out.push(Placed { token: Token::Mark(byte as char), line });
                at += 1;
            }
        }
    }
    Ok(out)
}

fn number<'a>(text: &'a str, line: u32) -> Result<Token<'a>, ParseError> {
    let wrong = || error(line, &format!("{text} is not a number"));
    let radix = |digits: &str, radix| u64::from_str_radix(digits.trim_end_matches('U'), radix).map_err(|_| wrong());
    Ok(match text.as_bytes() {
        [b'0', b'f' | b'F', ..] if text.len() == 10 => Token::F32(radix(&text[2..], 16)? as u32),
        [b'0', b'd' | b'D', ..] if text.len() == 18 => Token::F64(radix(&text[2..], 16)?),
        [b'0', b'x' | b'X', ..] => Token::Int(radix(&text[2..], 16)?),
        [b'0', b'b' | b'B', ..] => Token::Int(radix(&text[2..], 2)?),
        _ if text.contains('.') => Token::Word(text),
        [b'0', rest @ ..] if !rest.is_empty() && rest[0] != b'U' => Token::Int(radix(&text[1..], 8)?),
        _ => Token::Int(radix(text, 10)?),
    })
}

pub(super) fn error(line: u32, message: &str) -> ParseError {
    ParseError { line, message: message.to_owned() }
}
