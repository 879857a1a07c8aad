//! Rewrites the golden contract texts: `cargo run -p dsv4-model --example contracts`.

use std::path::Path;

fn main() -> std::io::Result<()> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    std::fs::write(golden.join("weight_contract.txt"), dsv4_model::contract::weight_contract())?;
    std::fs::write(golden.join("op_contract.txt"), dsv4_model::contract::op_contract())
}
