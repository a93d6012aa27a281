//! Compiles `kernels/*.cu` with nvcc, each to a fatbin (machine code for sm_80, sm_90a, sm_100 and sm_120, PTX of compute_80 for
//! the rest; what is Hopper's alone for sm_90a), and writes the table that `backend/cuda/module.rs` embeds. Only what changed is
//! compiled again. Without nvcc the table holds the CUDA source instead, which NVRTC compiles at run time. Never asks for a GPU.

use std::error::Error;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// What a kernel is compiled for.
const TARGETS: &[&str] = &[
    "arch=compute_80,code=sm_80",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_100,code=sm_100",
    "arch=compute_120,code=sm_120",
    "arch=compute_80,code=compute_80",
];

/// The same for kernels of the instructions that compute capability 9.0 alone has: files whose names end with `HOPPER`.
const HOPPER_TARGETS: &[&str] = &["arch=compute_90a,code=sm_90a", "arch=compute_90a,code=compute_90a"];
const HOPPER: &str = "_hopper";

/// Fused multiply-adds are explicit in the source, so that the CPU can do the same; warnings are errors. What ptxas tells of
/// registers and spills is kept beside each fatbin, for scripts/kernel-report. Compressed, all are a tenth of their size.
const FLAGS: &[&str] = &[
    "-fatbin",
    "-std=c++17",
    "-O3",
    "-fmad=false",
    "-lineinfo",
    "--compress-mode=size",
    "-Werror",
    "all-warnings",
    "-Xptxas",
    "-v",
];

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let root = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=kernels");
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", "VIRTUAL_ENV"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let sources = files(&root.join("kernels"), "cu")?;
    let headers = files(&root.join("kernels"), "cuh")?;
    let nvcc = find_nvcc();
    if let Some(nvcc) = &nvcc {
        compile_all(nvcc, &sources, &headers, &out)?;
    }
    let table = |paths: &[PathBuf], entry: &dyn Fn(&Path) -> String| -> String {
        paths.iter().map(|path| format!("    ({:?}, {}),\n", stem(path), entry(path))).collect()
    };
    let text = |path: &Path| format!("include_str!({:?})", path);
    let fatbins = match nvcc {
        Some(_) => table(&sources, &|path| format!("aligned!({:?})", out.join(stem(path)).with_extension("fatbin"))),
        None => String::new(),
    };
    let release = nvcc.as_deref().and_then(release);
    let generated = format!(
        "/// The release of the nvcc that compiled the kernels.\n\
         pub(super) const NVCC: Option<&str> = {release:?};\n\
         /// How names of sources end whose kernels are compute capability 9.0's alone.\n\
         const HOPPER_ENDING: &str = {HOPPER:?};\n\
         /// Fatbins by the name of their source; none where no nvcc was found.\n\
         pub(super) const FATBINS: &[(&str, &[u8])] = &[\n{fatbins}];\n\
         /// CUDA sources by name.\n\
         pub(super) const SOURCES: &[(&str, &str)] = &[\n{}];\n\
         /// Headers by name, without their ending.\n\
         pub(super) const HEADERS: &[(&str, &str)] = &[\n{}];\n",
        table(&sources, &text),
        table(&headers, &text),
    );
    write_if_changed(&out.join("kernels.rs"), generated.as_bytes())
}

fn stem(path: &Path) -> String {
    path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default()
}

fn files(folder: &Path, ending: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == ending) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn write_if_changed(path: &Path, content: &[u8]) -> Result<()> {
    if fs::read(path).ok().as_deref() != Some(content) {
        fs::write(path, content)?;
    }
    Ok(())
}

/// `$NVCC`, `$CUDA_HOME/bin`, `$PATH`, the usual prefixes, Python's `nvidia/cu13/bin`; the first that answers.
fn find_nvcc() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(named) = variable("NVCC") {
        if works(&named) {
            return Some(named);
        }
        println!("cargo::warning=NVCC names {}, which does not run; looking further", named.display());
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable).map(|home| home.join("bin"));
    let path = variable("PATH").unwrap_or_default();
    let usual = ["/usr/local/cuda/bin", "/opt/cuda/bin", "/usr/lib/nvidia-cuda-toolkit/bin"].map(PathBuf::from);
    let mut candidates: Vec<PathBuf> = homes.chain(std::env::split_paths(&path)).chain(usual).collect();
    candidates.extend(python_packages());
    candidates.into_iter().map(|folder| folder.join("nvcc")).find(|nvcc| works(nvcc))
}

fn works(nvcc: &Path) -> bool {
    Command::new(nvcc).arg("--version").output().is_ok_and(|output| output.status.success())
}

/// The release that nvcc's last lines tell: `13.0.88` of `Cuda compilation tools, release 13.0, V13.0.88`.
fn release(nvcc: &Path) -> Option<String> {
    let output = Command::new(nvcc).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (_, after) = text.rsplit_once(", V")?;
    after.split_whitespace().next().map(str::to_owned)
}

/// `nvidia/cu13/bin` in the package folders of a virtual environment and of the Python on the path.
fn python_packages() -> Vec<PathBuf> {
    let script = "import site, sysconfig; print('\\n'.join([sysconfig.get_path('purelib'), *site.getsitepackages(), site.getusersitepackages()]))";
    let pythons = std::env::var_os("VIRTUAL_ENV").map(|env| PathBuf::from(env).join("bin/python3"));
    let mut folders = Vec::new();
    for python in pythons.into_iter().chain([PathBuf::from("python3")]) {
        let Ok(output) = Command::new(python).args(["-c", script]).output() else { continue };
        let lines = String::from_utf8_lossy(&output.stdout).into_owned();
        folders.extend(lines.lines().map(|line| PathBuf::from(line).join("nvidia/cu13/bin")));
    }
    folders
}

/// Where a compiled kernel is kept for the builds of other profiles: `kernels/` in cargo's target folder.
struct Kept {
    fatbin: PathBuf,
    log: PathBuf,
}

impl Kept {
    fn new(out: &Path, source: &Path, stamp: &str) -> Option<Self> {
        // <target>/<profile>/build/<package>/out
        let folder = out.ancestors().nth(4)?.join("kernels");
        let name = format!("{}-{stamp}", stem(source));
        Some(Kept {
            fatbin: folder.join(&name).with_extension("fatbin"),
            log: folder.join(name).with_extension("ptxas"),
        })
    }

    fn pairs(&self, fatbin: &Path) -> [(PathBuf, PathBuf); 2] {
        // The log first: where the fatbin is, so is the log.
        [(self.log.clone(), fatbin.with_extension("ptxas")), (self.fatbin.clone(), fatbin.to_owned())]
    }

    /// Copies it into the build; whether it was there.
    fn take(&self, fatbin: &Path) -> bool {
        self.pairs(fatbin).iter().all(|(kept, to)| fs::copy(kept, to).is_ok())
    }

    /// Keeps it, aside and renamed, since another build may do the same. What cannot be kept is compiled again.
    fn keep(&self, fatbin: &Path) {
        let aside = |path: &Path| path.with_extension(format!("{}.tmp", std::process::id()));
        for (kept, from) in self.pairs(fatbin) {
            let folder = kept.parent().map_or(Ok(()), fs::create_dir_all);
            let done =
                folder.and_then(|()| fs::copy(&from, aside(&kept))).and_then(|_| fs::rename(aside(&kept), &kept));
            if done.is_err() {
                return;
            }
        }
    }
}

/// Hashes a source and the headers that it includes, each once.
fn hash_whole<'h>(source: &str, headers: &'h [(String, String)], seen: &mut Vec<&'h str>, hasher: &mut DefaultHasher) {
    source.hash(hasher);
    let included = source.lines().filter_map(|line| line.strip_prefix("#include \"")?.strip_suffix(".cuh\""));
    for name in included {
        if let Some((header, text)) = headers.iter().find(|(header, _)| header == name)
            && !seen.contains(&header.as_str())
        {
            seen.push(header);
            hash_whole(text, headers, seen, hasher);
        }
    }
}

/// Compiles what changed, as many at once as cargo allows.
fn compile_all(nvcc: &Path, sources: &[PathBuf], headers: &[PathBuf], out: &Path) -> Result<()> {
    let version = Command::new(nvcc).arg("--version").output()?.stdout;
    let headers: Vec<(String, String)> =
        headers.iter().map(|path| Ok((stem(path), fs::read_to_string(path)?))).collect::<Result<_>>()?;
    let mut stale = Vec::new();
    for source in sources {
        let mut hasher = DefaultHasher::new();
        (FLAGS, targets(source), &version).hash(&mut hasher);
        hash_whole(&fs::read_to_string(source)?, &headers, &mut Vec::new(), &mut hasher);
        let stamp = format!("{:016x}", hasher.finish());
        let fatbin = out.join(stem(source)).with_extension("fatbin");
        if !fatbin.exists() || fs::read_to_string(fatbin.with_extension("stamp")).ok().as_ref() != Some(&stamp) {
            stale.push((source.clone(), fatbin, stamp));
        }
    }
    let jobs = std::env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1usize).max(1);
    let queue = Mutex::new(stale);
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let Some((source, fatbin, stamp)) = queue.lock().ok().and_then(|mut queue| queue.pop()) else {
                        return;
                    };
                    let kept = Kept::new(out, &source, &stamp);
                    let there = kept.as_ref().is_some_and(|kept| kept.take(&fatbin));
                    let done = if there { Ok(()) } else { compile(nvcc, &source, &fatbin) };
                    if let (Ok(()), false, Some(kept)) = (&done, there, &kept) {
                        kept.keep(&fatbin);
                    }
                    let done = done.and_then(|()| {
                        fs::write(fatbin.with_extension("stamp"), stamp).map_err(|error| error.to_string())
                    });
                    if let (Err(message), Ok(mut failures)) = (done, failures.lock()) {
                        failures.push(message);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner()?;
    if failures.is_empty() { Ok(()) } else { Err(failures.join("\n").into()) }
}

fn targets(source: &Path) -> &'static [&'static str] {
    if stem(source).ends_with(HOPPER) { HOPPER_TARGETS } else { TARGETS }
}

fn compile(nvcc: &Path, source: &Path, fatbin: &Path) -> std::result::Result<(), String> {
    let mut command = Command::new(nvcc);
    command.args(FLAGS);
    for target in targets(source) {
        command.arg("-gencode").arg(target);
    }
    let output = command.arg("-o").arg(fatbin).arg(source).output().map_err(|error| error.to_string())?;
    if output.status.success() {
        return fs::write(fatbin.with_extension("ptxas"), output.stderr).map_err(|error| error.to_string());
    }
    Err(format!(
        "{} does not compile:\n{}{}",
        source.display(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    ))
}
