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

/// A loss: with four decimals, as `2.3026`, or with a power of ten where these would show little of it or much besides it, as
/// `1.234e-7` and `1.500e10`.
pub fn loss(value: f64) -> String {
    let small_or_large = value != 0.0 && value.is_finite() && !(1e-3..1e5).contains(&value.abs());
    if small_or_large { format!("{value:.3e}") } else { format!("{value:.4}") }
}

#[cfg(test)]
mod tests {
    #[test]
    fn losses_of_any_size_can_be_told_apart() {
        let found = [0.0, 2.345_678, 0.001, 0.000_999, 1.234e-7, 99_999.5, 1.5e10, -3e-5, f64::NAN].map(super::loss);
        assert_eq!(
            found,
            ["0.0000", "2.3457", "0.0010", "9.990e-4", "1.234e-7", "99999.5000", "1.500e10", "-3.000e-5", "NaN"]
        );
    }

    #[test]
    fn digits_stand_in_threes() {
        let found = [0, 12, 123, 1234, 1_234_567].map(super::grouped);
        assert_eq!(found, ["0", "12", "123", "1,234", "1,234,567"]);
    }
}
