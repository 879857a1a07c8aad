//! Offsets against numbers worked out by hand, and the rules against arbitrary plans.

mod support;

use dsv4_format::{FormatError, Place, RankLayout, SECTION_ALIGN, SectionPlan};
use proptest::prelude::*;
use support::{plans, section, tensor};

const MIB: u64 = 1 << 20;

#[test]
fn offsets_are_those_worked_out_by_hand() {
    let layout = RankLayout::new(&plans(0)).expect("layout");
    // embed ends at 8_400_953; norm at the next 256; wide (64 KiB) at the next 4096; narrow at the next 256.
    let expected = [
        ("embed", 0, 0, 0, 8_400_953),
        ("norm", 0, 8_401_152, 8_401_152, 100),
        ("wide", 0, 8_404_992, 8_404_992, 65_536),
        ("narrow", 0, 8_470_528, 8_470_528, 65_535),
        // embedding is 10 MiB long, layer.0 4 MiB, layer.1 2 MiB.
        ("layers.0.w", 1, 0, 10 * MIB, 3 * MIB + 1),
        ("layers.1.b", 2, 0, 14 * MIB, 4),
        ("layers.1.s", 2, 256, 14 * MIB + 256, 17),
    ];
    for (name, section, offset_in_section, arena_offset, len) in expected {
        let place = Place { section, offset_in_section, arena_offset, len };
        assert_eq!(layout.tensor(name), Some(place), "{name}");
    }
    assert_eq!(layout.tensor("absent"), None);
    let sections: Vec<_> = layout.sections().iter().map(|s| (s.name.as_str(), s.offset, s.len)).collect();
    assert_eq!(
        sections,
        [("embedding", 2 * MIB, 10 * MIB), ("layer.0", 12 * MIB, 4 * MIB), ("layer.1", 16 * MIB, 2 * MIB)]
    );
    assert_eq!(layout.arena_bytes(), 16 * MIB);
    assert_eq!(layout.file_len(), 18 * MIB + 4096);
}

#[test]
fn a_section_that_fills_its_blocks_gets_no_further_one() {
    let layout = RankLayout::new(&[section("full", vec![tensor("w", "f32", &[], 4 * MIB)])]).expect("layout");
    assert_eq!(layout.arena_bytes(), 4 * MIB);
    let layout = RankLayout::new(&[section("over", vec![tensor("w", "f32", &[], 4 * MIB + 1)])]).expect("layout");
    assert_eq!(layout.arena_bytes(), 6 * MIB);
}

#[test]
fn impossible_plans_are_refused_with_the_tensor_named() {
    let one = |name: &str, dtype: &str, bytes| vec![section("s", vec![tensor(name, dtype, &[1], bytes)])];
    let long = "x".repeat(256);
    let cases: Vec<(Vec<SectionPlan>, &str)> = vec![
        (vec![], "1 to 65536 sections"),
        (vec![section("s", vec![])], "tensors"),
        (one("w", "f32", 0), "bytes"),
        (one("w", "f32", (1 << 44) + 1), "bytes"),
        (one("w", "f32", u64::MAX), "bytes"),
        (one("", "f32", 1), "printable"),
        (one("a b", "f32", 1), "printable"),
        (one("w\n", "f32", 1), "printable"),
        (one(&long, "f32", 1), "printable"),
        (one("w", &long[..33], 1), "dtype"),
        (vec![section("s", vec![tensor("w", "f", &[1; 9], 1)])], "8 dimensions"),
        (vec![section("s", vec![tensor("w", "f", &[], 1), tensor("w", "f", &[], 1)])], "once"),
        (vec![section("a", vec![tensor("w", "f", &[], 1)]), section("b", vec![tensor("w", "f", &[], 1)])], "once"),
        (vec![section("s", vec![tensor("w", "f", &[], 1)]), section("s", vec![tensor("v", "f", &[], 1)])], "once"),
        (vec![section("s", vec![tensor("w", "f", &[], 1 << 44), tensor("v", "f", &[], 1)])], "bytes in a rank"),
    ];
    for (plan, expected) in cases {
        let error = RankLayout::new(&plan).expect_err(expected);
        assert!(matches!(error, FormatError::Layout { .. }));
        let text = error.to_string();
        assert!(text.contains(expected) && text.contains("\n  help: "), "{text}");
    }
}

proptest! {
    #[test]
    fn any_plan_is_packed_tightly_in_order(sizes in prop::collection::vec(prop::collection::vec(1u64..300_000, 1..20), 1..6)) {
        let plan: Vec<_> = sizes.iter().enumerate().map(|(s, tensors)| {
            let tensors = tensors.iter().enumerate().map(|(t, &bytes)| tensor(&format!("{s}.{t}"), "u8", &[bytes], bytes));
            section(&s.to_string(), tensors.collect())
        }).collect();
        let layout = RankLayout::new(&plan).expect("layout");
        let mut section_end = SECTION_ALIGN;
        for (s, section) in layout.sections().iter().enumerate() {
            prop_assert_eq!(section.offset, section_end);
            prop_assert_eq!(section.len % SECTION_ALIGN, 0);
            section_end += section.len;
            let mut end = 0;
            for (t, tensor) in section.tensors.iter().enumerate() {
                let align = if tensor.len >= 65_536 { 4096 } else { 256 };
                prop_assert_eq!(tensor.offset % align, 0);
                prop_assert!(tensor.offset >= end && tensor.offset - end < align);
                end = tensor.offset + tensor.len;
                prop_assert_eq!(tensor.len, sizes[s][t]);
                let place = layout.tensor(&tensor.name).expect("place");
                prop_assert_eq!(place.arena_offset, section.offset - SECTION_ALIGN + tensor.offset);
            }
            prop_assert!(section.len >= end && section.len - end < SECTION_ALIGN);
        }
        prop_assert_eq!(layout.arena_bytes() + SECTION_ALIGN, section_end);
        prop_assert_eq!(layout.file_len(), section_end + 4096);
    }
}
