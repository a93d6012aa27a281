//! Memory of a device that is neither of parameters nor of activations.

/// What operations take of a device's memory besides what they name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Workspace {
    /// Bytes for what an operation leaves for its own next kernel: one operation after the other uses the same.
    pub scratch: usize,
    /// Whether that is the most that a library may ask for, since no device was there to ask it on.
    pub is_bound: bool,
    /// Bytes that libraries have for themselves from their first call on.
    pub libraries: usize,
}

impl Workspace {
    /// What does for either, one after the other.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        let larger = if other.scratch > self.scratch { other } else { self };
        Workspace { libraries: self.libraries.max(other.libraries), ..larger }
    }
}
