//! Reads PTX files and says what is in them: `cargo run -p warpstep-emulator --example read -- kernels.ptx`.

use warpstep_emulator::ptx::Module;

fn main() {
    let mut failed = false;
    for path in std::env::args().skip(1) {
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) => {
                eprintln!("{path}: {error}");
                failed = true;
                continue;
            }
        };
        match Module::parse(&text) {
            Ok(module) => println!("{path}: {} kernels", module.kernel_names().count()),
            Err(error) => {
                eprintln!("{path}: {error}");
                failed = true;
            }
        }
    }
    std::process::exit(i32::from(failed));
}
