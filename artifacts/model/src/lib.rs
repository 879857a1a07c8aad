//! What packer and runtime must agree on about the model. Pure: no I/O, no GPU, no unsafe.
