//! Where a gradient's norm comes from: the share of each layer.

use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::plan::ParamLayout;

/// Layers that a record names at most.
pub const LAYERS: usize = 5;

/// The largest shares of the squared gradient norm, by tensor: largest first, as an object in JSON. All shares of a step, those
/// left out too, add up to 1.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NormShare(pub Vec<(String, f64)>);

impl NormShare {
    /// The `most` largest of the sums of squares of the layout's tensors; none where there was no update, or one whose norm was 0
    /// or not finite.
    pub fn largest(layout: &ParamLayout, squares: &[f64], most: usize) -> Option<Self> {
        let total: f64 = squares.iter().sum();
        if squares.len() != layout.entries().len() || !total.is_finite() || total <= 0.0 {
            return None;
        }
        let mut shares: Vec<(&str, f64)> =
            layout.entries().iter().zip(squares).map(|(entry, square)| (entry.name.as_str(), square / total)).collect();
        // Of equal shares the first in the arena, so that the order has one definition.
        shares.sort_by(|a, b| b.1.total_cmp(&a.1));
        shares.truncate(most);
        Some(NormShare(shares.into_iter().map(|(name, share)| (name.to_owned(), share)).collect()))
    }

    /// The share of a layer; none where it is not among the largest.
    pub fn of(&self, layer: &str) -> Option<f64> {
        self.0.iter().find(|(name, _)| name == layer).map(|(_, share)| *share)
    }
}

impl Serialize for NormShare {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, share)| (name, share)))
    }
}

impl<'de> Deserialize<'de> for NormShare {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Shares;
        impl<'de> Visitor<'de> for Shares {
            type Value = NormShare;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("shares of the gradient norm by the layer's name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<NormShare, A::Error> {
                let mut shares = Vec::new();
                while let Some(share) = map.next_entry()? {
                    shares.push(share);
                }
                Ok(NormShare(shares))
            }
        }
        deserializer.deserialize_map(Shares)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::ParamSpec;

    fn layout(names: &[&str]) -> ParamLayout {
        let specs: Vec<_> = names.iter().map(|&name| ParamSpec { name: name.into(), shape: vec![3] }).collect();
        ParamLayout::new(&specs).unwrap()
    }

    #[test]
    fn the_largest_shares_come_first_and_keep_their_order_in_json() {
        let layout = layout(&["z", "a", "b", "c"]);
        let share = NormShare::largest(&layout, &[1.0, 5.0, 1.0, 1.0], 3).unwrap();
        assert_eq!(share.0, [("a".to_owned(), 0.625), ("z".to_owned(), 0.125), ("b".to_owned(), 0.125)]);
        let text = serde_json::to_string(&share).unwrap();
        assert_eq!(text, r#"{"a":0.625,"z":0.125,"b":0.125}"#);
        assert_eq!(serde_json::from_str::<NormShare>(&text).unwrap(), share);
        assert_eq!((share.of("z"), share.of("c")), (Some(0.125), None));
    }

    #[test]
    fn a_norm_of_nothing_or_beyond_numbers_has_no_shares() {
        let layout = layout(&["a", "b"]);
        for squares in [&[][..], &[0.0, 0.0], &[1.0, f64::INFINITY], &[f64::NAN, 1.0]] {
            assert_eq!(NormShare::largest(&layout, squares, 5), None, "{squares:?}");
        }
    }
}
