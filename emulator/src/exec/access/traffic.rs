//! What accesses move, counted.

use crate::exec::Run;
use crate::exec::warp::lanes;
use crate::fault::Space;
use crate::ptx::Lanes;

impl Run<'_> {
    /// Counts what a warp's access moved.
    pub(super) fn count(&mut self, space: Space, addresses: &Lanes, active: u32, bytes: u64, write: bool) {
        let total = bytes * u64::from(active.count_ones());
        match space {
            Space::Global => {
                let sum = if write { &mut self.counts.global_written } else { &mut self.counts.global_read };
                *sum += total;
                let sectors = distinct(addresses, active, bytes, 32);
                // What several lanes read together comes once.
                let ideal = (bytes * different(addresses, active)).div_ceil(32);
                self.counts.sectors += sectors;
                self.counts.ideal_sectors += ideal;
                self.counts.accesses += 1;
                self.counts.uncoalesced += u64::from(sectors > ideal);
            }
            Space::Shared => {
                let sum = if write { &mut self.counts.shared_written } else { &mut self.counts.shared_read };
                *sum += total;
                self.counts.bank_conflicts += conflicts(addresses, active, bytes);
            }
            Space::Local => self.counts.local += total,
            Space::Param => {}
        }
    }
}

/// How many different addresses the lanes name.
fn different(addresses: &Lanes, active: u32) -> u64 {
    let (mut count, mut most) = (0, None);
    for lane in lanes(active) {
        let address = addresses[lane];
        // Addresses mostly go up, or stay.
        let known = match most {
            Some(most) if address > most => false,
            Some(most) if address == most => true,
            Some(_) => lanes(active).take_while(|&other| other < lane).any(|other| addresses[other] == address),
            None => false,
        };
        most = most.max(Some(address));
        count += u64::from(!known);
    }
    count
}

/// How many parts of `unit` bytes the lanes' accesses touch together.
fn distinct(addresses: &Lanes, active: u32, bytes: u64, unit: u64) -> u64 {
    let mut seen = [u64::MAX; 64];
    let mut count = 0;
    for lane in lanes(active) {
        for sector in addresses[lane] / unit..=(addresses[lane] + bytes - 1) / unit {
            // Neighbours mostly share a part, or go on to the next.
            let known = count > 0 && (seen[count - 1] == sector || seen[..count].contains(&sector));
            if !known && count < seen.len() {
                seen[count] = sector;
                count += 1;
            }
        }
    }
    count as u64
}

/// Passes besides the first that an access of shared memory takes: 32 banks of 4 bytes; wide accesses go by halves or quarters
/// of a warp.
fn conflicts(addresses: &Lanes, active: u32, bytes: u64) -> u64 {
    let together = match bytes {
        16.. => 8,
        8.. => 16,
        _ => 32,
    };
    let mut extra = 0;
    for start in (0..32).step_by(together) {
        let group = active & (((1u64 << together) - 1) << start) as u32;
        // Every word once, in the list of its bank.
        let (mut words, mut next, mut len) = ([0u64; 128], [u8::MAX; 128], 0);
        let (mut heads, mut lengths, mut most) = ([u8::MAX; 32], [0u8; 32], 0);
        for lane in lanes(group) {
            for word in addresses[lane] / 4..(addresses[lane] + bytes).div_ceil(4) {
                let bank = word as usize % 32;
                let mut at = heads[bank];
                while at != u8::MAX && words[at as usize] != word {
                    at = next[at as usize];
                }
                if at == u8::MAX {
                    (words[len], next[len]) = (word, heads[bank]);
                    heads[bank] = len as u8;
                    lengths[bank] += 1;
                    most = most.max(lengths[bank]);
                    len += 1;
                }
            }
        }
        extra += u64::from(most.saturating_sub(1));
    }
    extra
}
