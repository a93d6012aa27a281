//! Lines on standard error.

use std::fmt::Display;
use std::io::Write;

/// Prints a line by one write, as `eprintln!` does not: several threads, processes and libraries of a run write to the same standard
/// error, and a line of one must not begin within another's. Where nobody listens any more, nothing happens.
pub fn tell(line: impl Display) {
    write_line(&mut std::io::stderr(), line);
}

fn write_line(to: &mut impl Write, line: impl Display) {
    let _ = to.write_all(format!("{line}\n").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What came by each write.
    #[derive(Default)]
    struct Writes(Vec<String>);

    impl Write for Writes {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.push(String::from_utf8_lossy(bytes).into_owned());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_of_several_parts_is_one_write() {
        let mut writes = Writes::default();
        write_line(&mut writes, format_args!("rank {} on host {}", 1, "node7"));
        assert_eq!(writes.0, ["rank 1 on host node7\n"]);
    }
}
