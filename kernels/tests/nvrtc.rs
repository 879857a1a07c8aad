//! Kernels compile for both architectures without a GPU, and always to the same bytes.

use std::path::Path;

use dsv4_kernels::device::nvrtc::Nvrtc;
use dsv4_kernels::numerics::Numerics;
use dsv4_kernels::ops::rms_norm;

/// Where `scripts/setup cuda` puts it.
fn nvrtc() -> Option<Nvrtc> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/nvrtc");
    match Nvrtc::open(&dir) {
        Ok(nvrtc) => Some(nvrtc),
        Err(error) => {
            println!("SKIPPED compiling kernels: {error}");
            assert!(std::env::var_os("DSV4_NO_SKIPS").is_none(), "skips are not allowed");
            None
        }
    }
}

#[test]
fn the_same_text_gives_the_same_bytes() {
    let (Some(first), Some(again)) = (nvrtc(), nvrtc()) else { return };
    let unit = rms_norm::unit(4096, Numerics::Published);
    for arch in ["sm_90a", "sm_121a"] {
        let (cubin, log) = first.compile(&unit, arch).unwrap();
        assert!(log.contains("0 bytes spill stores"), "{log}");
        assert_eq!(cubin[..4], *b"\x7fELF");
        assert!(again.compile(&unit, arch).unwrap().0 == cubin);
        assert_ne!(unit.key(arch), unit.key("sm_90"));
    }
}

#[test]
fn a_unit_that_does_not_compile_says_why() {
    let Some(nvrtc) = nvrtc() else { return };
    let mut unit = rms_norm::unit(4096, Numerics::Float);
    unit.source = "KERNEL(rms_norm, RmsNormArgs, THREADS) { missing(a.x); }";
    let error = nvrtc.compile(&unit, "sm_90a").unwrap_err().to_string();
    assert!(error.contains("missing") && error.contains("rms_norm"), "{error}");
    let error = nvrtc.compile(&rms_norm::unit(4096, Numerics::Float), "sm_1").unwrap_err().to_string();
    assert!(error.contains("sm_1"), "{error}");
}
