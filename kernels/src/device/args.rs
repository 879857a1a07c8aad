//! Kernel arguments: one struct in Rust, from which the CUDA text and the bytes of a launch both come.

use std::marker::PhantomData;

/// Bytes of the largest argument struct.
pub const ARGS_BYTES_MAX: usize = 1024;

/// The bytes of one argument struct, laid out as C does.
#[derive(Clone, Copy)]
pub struct ArgBytes {
    bytes: [u8; ARGS_BYTES_MAX],
    len: usize,
}

impl ArgBytes {
    /// No bytes yet.
    pub fn new() -> ArgBytes {
        ArgBytes { bytes: [0; ARGS_BYTES_MAX], len: 0 }
    }

    /// Zeros up to the next multiple of `align`.
    pub fn align(&mut self, align: usize) {
        self.len = self.len.next_multiple_of(align);
    }

    /// Appends a value's bytes. Panics over [`ARGS_BYTES_MAX`]: the struct is ours.
    pub fn put(&mut self, value: &[u8]) {
        self.bytes[self.len..self.len + value.len()].copy_from_slice(value);
        self.len += value.len();
    }

    /// All of them.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Default for ArgBytes {
    fn default() -> ArgBytes {
        ArgBytes::new()
    }
}

/// What may stand in an argument struct.
pub trait ArgType {
    /// Bytes it is aligned to.
    const ALIGN: usize;
    /// Its declaration as a CUDA struct member.
    fn declare(name: &str) -> String;
    /// Types its declaration needs.
    fn needs() -> String {
        String::new()
    }
    /// Appends its bytes.
    fn put(&self, out: &mut ArgBytes);
}

macro_rules! number {
    ($rust:ty, $cuda:literal) => {
        impl ArgType for $rust {
            const ALIGN: usize = size_of::<$rust>();
            fn declare(name: &str) -> String {
                format!("{} {name};", $cuda)
            }
            fn put(&self, out: &mut ArgBytes) {
                out.align(Self::ALIGN);
                out.put(&self.to_le_bytes());
            }
        }
    };
}
number!(u32, "u32");
number!(i32, "int");
number!(u64, "u64");
number!(f32, "float");

impl<T: ArgType, const N: usize> ArgType for [T; N] {
    const ALIGN: usize = T::ALIGN;
    fn declare(name: &str) -> String {
        T::declare(&format!("{name}[{N}]"))
    }
    fn needs() -> String {
        T::needs()
    }
    fn put(&self, out: &mut ArgBytes) {
        self.iter().for_each(|v| v.put(out));
    }
}

/// What a device pointer points to.
pub trait Element {
    /// Its CUDA name.
    const CUDA: &'static str;
}

macro_rules! element {
    ($(#[$doc:meta])* $name:ident, $cuda:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub struct $name;
        impl Element for $name {
            const CUDA: &'static str = $cuda;
        }
    };
}
element!(
    /// An activation: bfloat16 in published numerics, float32 in float ones.
    Act,
    "act_t"
);
element!(
    /// A float32.
    F32,
    "float"
);
element!(
    /// The bits of a bfloat16.
    Bf16,
    "u16"
);
element!(
    /// A byte.
    U8,
    "u8"
);
element!(
    /// A 32-bit count or index.
    U32,
    "u32"
);
element!(
    /// A 32-bit signed integer.
    I32,
    "int"
);
element!(
    /// A cosine and a sine.
    Turn,
    "float2"
);
element!(
    /// What a kernel knows of a row of the step: see [`crate::device::rows`].
    StepRow,
    "Row"
);

/// A device address that a kernel reads from; 0 where the kernel allows nothing.
pub struct In<T>(pub u64, PhantomData<T>);
/// A device address that a kernel writes to.
pub struct Out<T>(pub u64, PhantomData<T>);

macro_rules! pointer {
    ($name:ident, $qualifier:literal) => {
        impl<T> $name<T> {
            /// At a device address.
            pub fn at(address: u64) -> $name<T> {
                $name(address, PhantomData)
            }
            /// Nothing.
            pub fn none() -> $name<T> {
                $name(0, PhantomData)
            }
        }
        impl<T> Clone for $name<T> {
            fn clone(&self) -> $name<T> {
                *self
            }
        }
        impl<T> Copy for $name<T> {}
        impl<T: Element> ArgType for $name<T> {
            const ALIGN: usize = 8;
            fn declare(name: &str) -> String {
                format!(concat!($qualifier, "{}* {}{};"), T::CUDA, "", name)
            }
            fn put(&self, out: &mut ArgBytes) {
                out.align(8);
                out.put(&self.0.to_le_bytes());
            }
        }
    };
}
pointer!(In, "const ");
pointer!(Out, "");

/// An argument struct.
pub trait KernelArgs {
    /// Its definition in CUDA, with the types that it needs.
    fn cuda() -> String;
    /// Its bytes.
    fn bytes(&self) -> ArgBytes;
}

/// Declares an argument struct: the Rust type, its CUDA text and its bytes.
#[macro_export]
macro_rules! kernel_args {
    ($($(#[$doc:meta])* pub struct $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty),* $(,)? })*) => { $(
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type),* }

        impl $crate::device::args::ArgType for $name {
            const ALIGN: usize = {
                let mut align = 1;
                $(
                    let of_field = <$type as $crate::device::args::ArgType>::ALIGN;
                    if of_field > align { align = of_field; }
                )*
                align
            };
            fn declare(name: &str) -> String {
                format!("{} {name};", stringify!($name))
            }
            fn needs() -> String {
                let mut text = String::new();
                $(
                    let needed = <$type as $crate::device::args::ArgType>::needs();
                    if !text.contains(&needed) { text += &needed; }
                )*
                text += concat!("struct ", stringify!($name), " {");
                $( text += " "; text += &<$type as $crate::device::args::ArgType>::declare(stringify!($field)); )*
                text + " };\n"
            }
            fn put(&self, out: &mut $crate::device::args::ArgBytes) {
                out.align(<Self as $crate::device::args::ArgType>::ALIGN);
                $( <$type as $crate::device::args::ArgType>::put(&self.$field, out); )*
                out.align(<Self as $crate::device::args::ArgType>::ALIGN);
            }
        }

        impl $crate::device::args::KernelArgs for $name {
            fn cuda() -> String {
                <$name as $crate::device::args::ArgType>::needs()
            }
            fn bytes(&self) -> $crate::device::args::ArgBytes {
                let mut out = $crate::device::args::ArgBytes::new();
                $crate::device::args::ArgType::put(self, &mut out);
                out
            }
        }
    )* };
}

#[cfg(test)]
mod tests {
    use super::*;

    kernel_args! {
        pub struct Part { at: In<U8>, rows: u32 }
        pub struct Whole { first: u32, parts: [Part; 2], y: Out<Act>, eps: f32 }
    }

    #[test]
    fn text_and_bytes_agree_with_c() {
        assert_eq!(
            Whole::cuda(),
            "struct Part { const u8* at; u32 rows; };\nstruct Whole { u32 first; Part parts[2]; act_t* y; float eps; };\n"
        );
        let part = |at, rows| Part { at: In::at(at), rows };
        let whole = Whole { first: 7, parts: [part(1, 2), part(3, 4)], y: Out::at(5), eps: 1.0 };
        let words: Vec<u32> =
            whole.bytes().as_slice().chunks(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        assert_eq!(words, [7, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 1.0f32.to_bits(), 0]);
    }
}
