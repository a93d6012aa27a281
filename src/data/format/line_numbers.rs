//! The lines of a text, as an editor counts them.

/// Numbers lines by their offsets, from first to last. A line ends with LF, CR LF or CR.
pub(super) struct LineNumbers<'a> {
    text: &'a [u8],
    /// The bytes before it are counted.
    at: usize,
    line: u64,
}

impl<'a> LineNumbers<'a> {
    /// Of a text without a byte order mark.
    pub fn new(text: &'a [u8]) -> Self {
        LineNumbers { text, at: 0, line: 1 }
    }

    /// The line, from 1, of the row that a reader of tables finds from byte `offset` on: it passes by the rest of a line's end and
    /// lines without a character. No offset may be smaller than one before it.
    pub fn of_row(&mut self, offset: u64) -> u64 {
        while let Some(&byte) = self.text.get(self.at) {
            let ends = match byte {
                b'\n' => true,
                b'\r' => self.text.get(self.at + 1) != Some(&b'\n'),
                _ => false,
            };
            if self.at as u64 >= offset && !matches!(byte, b'\n' | b'\r') {
                break;
            }
            self.line += u64::from(ends);
            self.at += 1;
        }
        self.line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_on_the_line_that_an_editor_shows_whatever_ends_the_lines() {
        for end in ["\n", "\r\n", "\r"] {
            let text = format!("a{end}{end}{end}b,\"c{end}d\"{end}e");
            let offset = |part: &str| text.find(part).unwrap() as u64;
            let mut lines = LineNumbers::new(text.as_bytes());
            assert_eq!(lines.of_row(0), 1);
            // A reader of tables is done with a row at the first byte of its end.
            assert_eq!(lines.of_row(2), 4, "{end:?}");
            assert_eq!(lines.of_row(offset("b")), 4, "{end:?}");
            assert_eq!(lines.of_row(offset("e")), 6, "{end:?}");
        }
    }
}
