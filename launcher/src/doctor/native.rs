//! The native libraries that are used where they are: what each gives, and how to get it.

use super::Finding;
use super::library::{self, Ask, Told};

/// One library.
#[derive(Debug)]
struct Native {
    name: &'static str,
    files: &'static [&'static str],
    ask: Ask,
    /// The parts of a packed number, from the first; each is what is left when divided.
    divisors: &'static [u64],
    lost: &'static str,
    hint: &'static str,
}

const NATIVE: &[Native] = &[
    Native {
        name: "cuda driver",
        files: &["libcuda.so.1"],
        ask: Ask::OneNumber(c"cuDriverGetVersion"),
        divisors: &[1000, 10],
        lost: "GPUs: models run on the processor",
        hint: "install the NVIDIA driver of this machine's GPUs; in a container, start it with GPUs (--gpus all, --nv)",
    },
    Native {
        name: "nvrtc",
        files: &["libnvrtc.so.13", "libnvrtc.so.12"],
        ask: Ask::TwoNumbers(c"nvrtcVersion"),
        divisors: &[],
        lost: "compiling kernels for this machine's GPUs",
        hint: "install the CUDA runtime compiler (package cuda-nvrtc, or pip install nvidia-cuda-nvrtc with its lib folder in LD_LIBRARY_PATH)",
    },
    Native {
        name: "cublaslt",
        files: &["libcublasLt.so.13", "libcublasLt.so.12"],
        ask: Ask::Size(c"cublasLtGetVersion"),
        divisors: &[10_000, 100, 1],
        lost: "fast matrix products on GPUs",
        hint: "install cuBLAS (package libcublas, or pip install nvidia-cublas with its lib folder in LD_LIBRARY_PATH)",
    },
    Native {
        name: "nccl",
        files: &["libnccl.so.2"],
        ask: Ask::OneNumber(c"ncclGetVersion"),
        divisors: &[10_000, 100, 1],
        lost: "sums between GPUs of one instance over NVLink and InfiniBand",
        hint: "install NCCL (package libnccl2, or pip install nvidia-nccl-cu13 with its lib folder in LD_LIBRARY_PATH)",
    },
    Native {
        name: "pmix",
        files: &["libpmix.so.2"],
        ask: Ask::Text(c"PMIx_Get_version"),
        divisors: &[],
        lost: "ranks that find each other without a secret: export BATON_JOB_SECRET to all of them instead",
        hint: "install PMIx 3 or later (package libpmix2)",
    },
    Native {
        name: "ucp",
        files: &["libucp.so.0"],
        ask: Ask::Text(c"ucp_get_version_string"),
        divisors: &[],
        lost: "kv over UCX: InfiniBand, RoCE, NVLink between processes",
        hint: "install UCX (package libucx0, or pip install libucx-cu13 with its lib folder in LD_LIBRARY_PATH)",
    },
];

/// Looks at all of them.
pub(super) fn look() -> Vec<Finding> {
    let mut findings: Vec<Finding> = NATIVE.iter().map(Native::look).collect();
    findings.push(mpi());
    findings
}

impl Native {
    fn look(&self) -> Finding {
        match library::ask(self.files, self.ask) {
            Ok((file, told)) => {
                let version = self.shown(&told);
                Finding::good("library", self.name, format!("{version} ({file})"))
            }
            Err(reason) => {
                Finding::absent("library", self.name, reason).losing(self.lost, self.hint)
            }
        }
    }

    fn shown(&self, told: &Told) -> String {
        match told {
            Told::Text(text) => one_line(text),
            Told::Pair(major, minor) => format!("{major}.{minor}"),
            Told::Number(packed) => {
                let mut rest = *packed;
                let parts = self.divisors.iter().map(|divisor| {
                    let part = rest / divisor;
                    rest %= divisor;
                    part.to_string()
                });
                parts.collect::<Vec<_>>().join(".")
            }
        }
    }
}

/// Some libraries tell their version in a paragraph.
fn one_line(text: &str) -> String {
    let first = text.lines().next().unwrap_or_default();
    let version = first.split(" (").next().unwrap_or_default();
    version.trim().to_owned()
}

/// MPI's interface is no library's of a fixed name: the plug-in opens the MPI that it was built with.
fn mpi() -> Finding {
    match baton_engine::collective::mpi::probe() {
        Ok(()) => Finding::good(
            "library",
            "mpi plug-in",
            "opens, with the MPI that it was built for".to_owned(),
        ),
        Err(error) => {
            let text = error.to_string();
            let (reason, hint) = text.split_once("\nhint: ").unwrap_or((&text, ""));
            Finding::absent("library", "mpi plug-in", reason.to_owned())
                .losing("sums and kv over MPI (--fabric mpi)", hint)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> &'static Native {
        NATIVE.iter().find(|native| native.name == name).unwrap()
    }

    #[test]
    fn packed_versions_are_taken_apart() {
        for (name, packed, shown) in [
            ("cuda driver", 13_010, "13.1"),
            ("cuda driver", 12_080, "12.8"),
            ("nccl", 22_809, "2.28.9"),
            ("cublaslt", 130_100, "13.1.0"),
        ] {
            assert_eq!(named(name).shown(&Told::Number(packed)), shown);
        }
        assert_eq!(named("nvrtc").shown(&Told::Pair(13, 0)), "13.0");
        let long = "OpenPMIx 4.2.2 (PMIx Standard: 4.1)\nmore";
        assert_eq!(
            named("pmix").shown(&Told::Text(long.to_owned())),
            "OpenPMIx 4.2.2"
        );
    }

    #[test]
    fn what_is_missing_says_what_is_lost_and_how_to_get_it() {
        for finding in look() {
            assert!(!finding.found.is_empty(), "{finding:?}");
            assert_eq!(
                finding.lost.is_some(),
                finding.level != super::super::Level::Good
            );
            assert_eq!(
                finding.hint.is_some(),
                finding.lost.is_some(),
                "{finding:?}"
            );
        }
    }
}
