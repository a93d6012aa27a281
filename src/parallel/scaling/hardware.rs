//! Figures of devices, from their makers' data sheets, and of what joins them.

/// A device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hardware {
    /// As it is asked for: `h100`.
    pub name: &'static str,
    /// Its maker's name for it.
    pub title: &'static str,
    /// Bytes of memory.
    pub memory: f64,
    /// Bytes a second of memory.
    pub bandwidth: f64,
    /// Floating-point operations a second of products with inputs in bf16 and f16, dense, summed in f32.
    pub half: f64,
    /// In tf32.
    pub tf32: f64,
    /// In f32, without tensor cores.
    pub single: f64,
    /// Bytes a second that an all-reduce within a node moves, per process (its bus bandwidth).
    pub node_bandwidth: f64,
}

/// What is known. Memory, bandwidth and arithmetic are those of the data sheets; bandwidths within a node are measured ones where
/// they are published (H100: 370 GB/s as a ring, nccl-tests#212), else 0.82 of one direction of the link, as there.
pub const GPUS: [Hardware; 7] = [
    Hardware {
        name: "h100",
        title: "NVIDIA H100 SXM",
        memory: 80e9,
        bandwidth: 3.35e12,
        half: 989e12,
        tf32: 494.5e12,
        single: 66.9e12,
        node_bandwidth: 370e9,
    },
    Hardware {
        name: "h200",
        title: "NVIDIA H200 SXM",
        memory: 141e9,
        bandwidth: 4.8e12,
        half: 989e12,
        tf32: 494.5e12,
        single: 66.9e12,
        node_bandwidth: 370e9,
    },
    Hardware {
        name: "b200",
        title: "NVIDIA B200 SXM",
        memory: 180e9,
        bandwidth: 8.0e12,
        half: 2250e12,
        tf32: 1125e12,
        single: 75e12,
        node_bandwidth: 740e9,
    },
    Hardware {
        name: "a100",
        title: "NVIDIA A100 SXM, 80 GB",
        memory: 80e9,
        bandwidth: 2.039e12,
        half: 312e12,
        tf32: 156e12,
        single: 19.5e12,
        node_bandwidth: 246e9,
    },
    Hardware {
        name: "a100-40gb",
        title: "NVIDIA A100 SXM, 40 GB",
        memory: 40e9,
        bandwidth: 1.555e12,
        half: 312e12,
        tf32: 156e12,
        single: 19.5e12,
        node_bandwidth: 246e9,
    },
    Hardware {
        name: "l40s",
        title: "NVIDIA L40S, PCIe 4",
        memory: 48e9,
        bandwidth: 0.864e12,
        half: 362e12,
        tf32: 183e12,
        single: 91.6e12,
        node_bandwidth: 20e9,
    },
    Hardware {
        name: "rtx4090",
        title: "NVIDIA GeForce RTX 4090, PCIe 4",
        memory: 24e9,
        bandwidth: 1.008e12,
        half: 165.2e12,
        tf32: 82.6e12,
        single: 82.6e12,
        node_bandwidth: 20e9,
    },
];

impl Hardware {
    /// What is known of a device by the name that its driver gives it; of others, of the same chip on another card among them, nothing.
    pub fn of_device(name: &str) -> Option<&'static Hardware> {
        let name = match name {
            "NVIDIA H100 80GB HBM3" => "h100",
            "NVIDIA H200" => "h200",
            "NVIDIA B200" => "b200",
            "NVIDIA A100-SXM4-80GB" | "NVIDIA A100 80GB PCIe" => "a100",
            "NVIDIA A100-SXM4-40GB" | "NVIDIA A100-PCIE-40GB" => "a100-40gb",
            "NVIDIA L40S" => "l40s",
            "NVIDIA GeForce RTX 4090" => "rtx4090",
            _ => return None,
        };
        GPUS.iter().find(|gpu| gpu.name == name)
    }

    /// Floating-point operations a second of its products at most, by what their inputs are: `bf16`, `f16`, `tf32`, `f32`.
    pub fn arithmetic(&self, precision: &str) -> f64 {
        match precision {
            "bf16" | "f16" => self.half,
            "tf32" => self.tf32,
            _ => self.single,
        }
    }
}

/// How processes are joined.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Links {
    /// Processes of a node.
    pub per_node: usize,
    /// Nodes.
    pub nodes: usize,
    /// Bytes a second of a process's collectives within its node.
    pub node_bandwidth: f64,
    /// Seconds of a step of the way within a node.
    pub node_latency: f64,
    /// Bytes a second of a process's collectives between nodes.
    pub network_bandwidth: f64,
    /// Seconds of a step of the way between nodes.
    pub network_latency: f64,
}

impl Links {
    /// Processes in all.
    pub fn world(&self) -> usize {
        self.per_node * self.nodes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_known_by_their_drivers_names() {
        let half = |name| Hardware::of_device(name).map(|gpu| gpu.arithmetic("bf16"));
        assert_eq!(half("NVIDIA H200"), Some(989e12));
        assert_eq!(half("NVIDIA A100-SXM4-40GB"), Some(312e12));
        // A slower card with the same chip.
        assert_eq!(half("NVIDIA H100 PCIe"), None);
        let h100 = Hardware::of_device("NVIDIA H100 80GB HBM3").unwrap();
        assert_eq!(["f16", "tf32", "f32"].map(|of| h100.arithmetic(of)), [989e12, 494.5e12, 66.9e12]);
    }
}
