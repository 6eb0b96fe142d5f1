//! Every kernel compiles for every generation of cards, on machines without one; and what the cache keeps.

use super::super::compiler::FILE_VARIABLE;
use super::*;

/// Ampere, Hopper, Blackwell.
const TARGETS: [&str; 3] = ["sm_80", "sm_90", "sm_100"];

/// Every combination that a model may ask for, as far as the text depends on it.
fn variants(source: Source) -> Vec<Variant> {
    let pages = |dims: &[usize], dtypes: &[KvDtype]| {
        let each = dims.iter().flat_map(|&head_dim| {
            dtypes.iter().map(move |&dtype| Variant {
                head_dim,
                pages: Some((32, dtype)),
            })
        });
        each.collect()
    };
    let (half, all) = (
        [KvDtype::F16, KvDtype::Bf16, KvDtype::Fp8],
        [KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Fp8],
    );
    match source {
        Source::Rope => {
            let mut variants: Vec<_> = pages(&[64, 80], &all);
            variants.push(Variant::of_heads(128));
            variants
        }
        Source::AttentionAny => pages(&[24, 256], &all),
        Source::AttentionPrefill => pages(&[64, 80, 128], &half),
        Source::AttentionPrefillHopper => {
            let mut variants = pages(&[128], &half);
            // Pages that a pass of rows does not divide, and one that is larger than a tile.
            variants.extend([5, 256].map(|tokens| Variant {
                head_dim: 128,
                pages: Some((tokens, KvDtype::Fp8)),
            }));
            variants
        }
        Source::AttentionDecode => pages(&[64, 128], &half),
        _ => vec![Variant::default()],
    }
}

/// The compiler, or nothing where a developer has none. `scripts/test`, hence CI, names it.
fn compiler() -> Option<Compiler> {
    let named = ["CI", FILE_VARIABLE]
        .map(std::env::var_os)
        .iter()
        .any(Option::is_some);
    match Compiler::open() {
        Ok(compiler) => Some(compiler),
        Err(error) if named => panic!("{error}"),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// Whether a source is ever compiled for such a card.
fn is_for(source: Source, target: &str) -> bool {
    match source {
        Source::AttentionPrefillHopper => target == "sm_90",
        // Ampere multiplies no 8-bit floats.
        Source::LinearRowsE4m3 => target != "sm_80",
        _ => true,
    }
}

fn compiles_for(target: &str, types: &[ActivationDtype]) {
    let Some(compiler) = compiler() else { return };
    for source in Source::ALL {
        if !is_for(source, target) {
            continue;
        }
        let each = variants(source).into_iter();
        for (variant, act) in each.flat_map(|variant| types.iter().map(move |&act| (variant, act)))
        {
            let (name, text) = (source.file().0, source.text());
            let defines = variant.defines(act);
            let cubin = compiler.cubin((name, &text), &source.target(target), &defines);
            let cubin = cubin.unwrap_or_else(|error| panic!("{variant:?} {act:?}: {error}"));
            assert_eq!(&cubin[..4], b"\x7fELF", "{name}");
        }
    }
}

#[test]
fn kernels_compile_for_ampere() {
    compiles_for(TARGETS[0], &[ActivationDtype::Bf16]);
}

#[test]
fn kernels_compile_for_hopper() {
    // What the type of activations changes is the same for all targets.
    compiles_for(TARGETS[1], &[ActivationDtype::Bf16, ActivationDtype::F16]);
}

#[test]
fn kernels_compile_for_blackwell() {
    compiles_for(TARGETS[2], &[ActivationDtype::Bf16]);
}

#[test]
fn what_is_wrong_with_a_kernel_is_said() {
    let Some(compiler) = compiler() else { return };
    let broken = ("broken.cu", "__global__ void f() { undeclared(); }");
    let error = compiler.cubin(broken, "sm_90", &[]).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("broken.cu") && text.contains("undeclared"),
        "{text}"
    );
}

#[test]
fn a_kept_cubin_is_read_back_unless_it_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("deep/er/one.cubin");
    assert_eq!(read_checked(&file), None);
    keep(&file, b"cubin");
    assert_eq!(read_checked(&file).as_deref(), Some(&b"cubin"[..]));
    let mut bytes = fs::read(&file).unwrap();
    bytes[2] ^= 1;
    fs::write(&file, &bytes).unwrap();
    assert_eq!(read_checked(&file), None);
    fs::write(&file, b"short").unwrap();
    assert_eq!(read_checked(&file), None);
}
