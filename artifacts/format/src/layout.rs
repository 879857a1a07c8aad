//! Where every tensor of a rank lies, in the file and in memory. The only arithmetic on offsets:
//! the writer follows it, and the reader recomputes it from the manifest and requires equality.
//!
//! File: superblock in the first 2 MiB, sections one after another, superblock copy in the last
//! 4 KiB. Arena: the sections one after another, so `arena offset == file offset - 2 MiB`.

use std::collections::{HashMap, HashSet};

use crate::error::FormatError;
use crate::header::{
    DIMS_MAX, DTYPE_BYTES_MAX, HEADER_BYTES, LARGE_TENSOR_ALIGN, LARGE_TENSOR_BYTES, NAME_BYTES_MAX, RANK_BYTES_MAX,
    SECTION_ALIGN, SECTIONS_MAX, SMALL_TENSOR_ALIGN, TENSORS_MAX,
};
use crate::manifest::Tensor;

/// A tensor before it has a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorPlan {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<u64>,
    pub bytes: u64,
}

/// Tensors in the order they will be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectionPlan {
    pub name: String,
    pub tensors: Vec<TensorPlan>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectionLayout {
    pub name: String,
    /// In the rank file.
    pub offset: u64,
    /// Padding included; a multiple of 2 MiB.
    pub len: u64,
    /// In ascending order of offset.
    pub tensors: Vec<Tensor>,
}

/// Where one tensor's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index into [`RankLayout::sections`].
    pub section: usize,
    pub offset_in_section: u64,
    pub arena_offset: u64,
    pub len: u64,
}

/// One rank's file and arena.
#[derive(Clone, Debug)]
pub struct RankLayout {
    sections: Vec<SectionLayout>,
    places: HashMap<String, Place>,
    arena_bytes: u64,
}

impl RankLayout {
    /// Places tensors in the given order: 4 KiB alignment from 64 KiB upwards, 256 B below.
    ///
    /// Errors: no or too many sections, a section without tensors, an empty tensor, a name that is
    /// empty, too long, not printable or used twice in the rank, or a rank above 16 TiB.
    pub fn new(plans: &[SectionPlan]) -> Result<Self, FormatError> {
        if plans.is_empty() || plans.len() > SECTIONS_MAX {
            let expected = format!("1 to {SECTIONS_MAX} sections");
            return Err(fault("", "", expected, plans.len().to_string()));
        }
        let mut layout =
            RankLayout { sections: Vec::with_capacity(plans.len()), places: HashMap::new(), arena_bytes: 0 };
        let mut section_names = HashSet::new();
        for plan in plans {
            check_name(&plan.name, "", &plan.name)?;
            if !section_names.insert(plan.name.as_str()) {
                return Err(fault(&plan.name, "", "a section name used once".into(), "it again".into()));
            }
            layout.push(plan)?;
        }
        Ok(layout)
    }

    fn push(&mut self, plan: &SectionPlan) -> Result<(), FormatError> {
        let index = self.sections.len();
        let base = self.arena_bytes;
        let mut end = 0u64;
        let mut tensors = Vec::with_capacity(plan.tensors.len());
        for tensor in &plan.tensors {
            check_tensor(&plan.name, tensor)?;
            let offset = end.next_multiple_of(tensor_align(tensor.bytes));
            // No overflow: every length is at most RANK_BYTES_MAX and the sum is checked each time.
            end = offset + tensor.bytes;
            if base + end > RANK_BYTES_MAX {
                let expected = format!("at most {RANK_BYTES_MAX} bytes in a rank");
                return Err(fault(&plan.name, &tensor.name, expected, (base + end).to_string()));
            }
            let place =
                Place { section: index, offset_in_section: offset, arena_offset: base + offset, len: tensor.bytes };
            if self.places.insert(tensor.name.clone(), place).is_some() {
                let expected = "a tensor name used once in a rank".into();
                return Err(fault(&plan.name, &tensor.name, expected, "it again".into()));
            }
            tensors.push(Tensor {
                name: tensor.name.clone(),
                dtype: tensor.dtype.clone(),
                shape: tensor.shape.clone(),
                offset,
                len: tensor.bytes,
            });
        }
        if tensors.is_empty() || self.places.len() > TENSORS_MAX {
            let expected = format!("1 to {TENSORS_MAX} tensors");
            return Err(fault(&plan.name, "", expected, self.places.len().to_string()));
        }
        let len = end.next_multiple_of(SECTION_ALIGN);
        self.sections.push(SectionLayout { name: plan.name.clone(), offset: SECTION_ALIGN + base, len, tensors });
        self.arena_bytes = base + len;
        Ok(())
    }

    pub fn tensor(&self, name: &str) -> Option<Place> {
        self.places.get(name).copied()
    }

    pub fn sections(&self) -> &[SectionLayout] {
        &self.sections
    }

    /// Both superblocks, head room and all sections.
    pub fn file_len(&self) -> u64 {
        self.tail_offset() + HEADER_BYTES as u64
    }

    /// Memory for all sections; a multiple of 2 MiB.
    pub fn arena_bytes(&self) -> u64 {
        self.arena_bytes
    }

    /// Where the superblock's copy lies.
    pub(crate) fn tail_offset(&self) -> u64 {
        SECTION_ALIGN + self.arena_bytes
    }
}

impl SectionLayout {
    /// The byte ranges of the section that belong to no tensor.
    pub(crate) fn gaps(&self) -> Vec<(u64, u64)> {
        let mut gaps = Vec::new();
        let mut end = 0;
        for tensor in &self.tensors {
            if tensor.offset > end {
                gaps.push((end, tensor.offset));
            }
            end = tensor.offset + tensor.len;
        }
        if self.len > end {
            gaps.push((end, self.len));
        }
        gaps
    }
}

fn tensor_align(bytes: u64) -> u64 {
    if bytes >= LARGE_TENSOR_BYTES { LARGE_TENSOR_ALIGN } else { SMALL_TENSOR_ALIGN }
}

fn check_tensor(section: &str, tensor: &TensorPlan) -> Result<(), FormatError> {
    check_name(section, &tensor.name, &tensor.name)?;
    check_name(section, &tensor.name, &tensor.dtype)?;
    if tensor.dtype.len() > DTYPE_BYTES_MAX {
        let expected = format!("a dtype of at most {DTYPE_BYTES_MAX} bytes");
        return Err(fault(section, &tensor.name, expected, tensor.dtype.clone()));
    }
    if tensor.shape.len() > DIMS_MAX {
        let expected = format!("at most {DIMS_MAX} dimensions");
        return Err(fault(section, &tensor.name, expected, tensor.shape.len().to_string()));
    }
    if tensor.bytes == 0 || tensor.bytes > RANK_BYTES_MAX {
        let expected = format!("1 to {RANK_BYTES_MAX} bytes");
        return Err(fault(section, &tensor.name, expected, tensor.bytes.to_string()));
    }
    Ok(())
}

fn check_name(section: &str, tensor: &str, name: &str) -> Result<(), FormatError> {
    if is_name(name) {
        return Ok(());
    }
    let expected = format!("1 to {NAME_BYTES_MAX} printable ASCII characters");
    let found: String = name.chars().take(NAME_BYTES_MAX).flat_map(char::escape_debug).collect();
    Err(fault(section, tensor, expected, found))
}

/// Names are shown to people and compared byte by byte: printable ASCII without spaces.
pub(crate) fn is_name(name: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic())
}

fn fault(section: &str, tensor: &str, expected: String, found: String) -> FormatError {
    FormatError::Layout { section: section.into(), tensor: tensor.into(), expected, found }
}
