//! A plan as people read it.

use super::{Plan, USABLE_MEMORY};
use crate::text::grouped;

impl Plan {
    pub(super) fn text(&self) -> String {
        let processes = self.nodes * self.processes_a_node;
        let nodes = if self.nodes == 1 { "1 node".to_owned() } else { format!("{} nodes", self.nodes) };
        let mut text = format!(
            "{nodes} of {} {}: {}, each with {} of a batch of {}, in {}\n\nmemory of each\n",
            self.processes_a_node,
            self.device,
            if processes == 1 { "1 process".to_owned() } else { format!("{processes} processes") },
            self.batch_size / processes,
            grouped(self.batch_size as u64),
            self.precision,
        );
        for part in &self.memory {
            text += format!("  {:<34} {:>12}  {}", part.name, gib(part.bytes as f64), part.of).trim_end();
            text.push('\n');
        }
        let total: usize = self.memory.iter().map(|part| part.bytes).sum();
        let of = self.memory_of_device.map_or_else(String::new, |memory| {
            let fits = if total as f64 <= memory * USABLE_MEMORY { "" } else { ": it does not fit" };
            format!("  of {}{fits}", gib(memory))
        });
        text += &format!("  {:<34} {:>12}{of}\n", "together", gib(total as f64));
        if let Some(largest) = self.largest_batch {
            text += &match largest {
                0 => "  not one sample fits\n".to_owned(),
                _ => format!(
                    "  largest batch that fits: {} in each, {} in all\n",
                    grouped(largest as u64),
                    grouped((largest * processes) as u64)
                ),
            };
        }
        text += "\na step\n";
        text += &format!("  {:<44} {:>10.3} ms\n", "forward and backward, at their floors", self.compute_milliseconds);
        for sent in &self.communication {
            text += &format!(
                "  {:<44} {:>10.3} ms not hidden of {:.3}; {:.1} MB sent by each\n",
                sent.what,
                sent.not_hidden_milliseconds,
                sent.milliseconds,
                sent.bytes / 1e6
            );
        }
        text += &format!("  {:<44} {:>10.3} ms\n", "update", self.update_milliseconds);
        text += &format!(
            "  {:<44} {:>10.3} ms: {} {} a second, {:.0} % of the peak arithmetic\n",
            "together",
            self.step_milliseconds,
            grouped(self.per_second.round() as u64),
            self.unit,
            100.0 * self.utilization
        );
        for (title, rows) in
            [("this batch, shared out", &self.same_batch), ("as much in each process", &self.same_share)]
        {
            text += &format!(
                "\n{title}\n  {:>9} {:>10} {:>12} {:>16} {:>11}\n",
                "processes",
                "in each",
                "ms a step",
                format!("{} a second", self.unit),
                "efficiency"
            );
            for row in rows {
                text += &format!(
                    "  {:>9} {:>10} {:>12.3} {:>16} {:>9.1} %\n",
                    row.processes,
                    row.batch_a_process,
                    row.milliseconds,
                    grouped(row.per_second.round() as u64),
                    100.0 * row.efficiency
                );
            }
        }
        text
    }
}

/// GiB, or MiB where that is less than one.
fn gib(bytes: f64) -> String {
    let gib = bytes / f64::from(1u32 << 30);
    if gib >= 1.0 { format!("{gib:.2} GiB") } else { format!("{:.2} MiB", gib * 1024.0) }
}
