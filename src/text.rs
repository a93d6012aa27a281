//! Numbers as people read them.

/// A whole number with its digits in threes: `1234567` as `1,234,567`.
pub fn grouped(value: impl std::fmt::Display) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn digits_stand_in_threes() {
        let found = [0, 12, 123, 1234, 1_234_567].map(super::grouped);
        assert_eq!(found, ["0", "12", "123", "1,234", "1,234,567"]);
    }
}
