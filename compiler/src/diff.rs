//! Why two artifacts differ: the report, and what the manifests alone say.
//!
//! Two artifacts are equal when their artifact ids are, which cover everything that can change a
//! token. Differences come in kinds, from identities down to single weights; of each kind all are
//! counted and the first 20 shown. Weights are read only where block hashes differ, and then only as far as a
//! tensor's first difference. Nothing here judges an artifact: that is `verify`'s work.

mod texts;
mod weights;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::PathBuf;

use dsv4_format::{Artifact, KernelRecord, Manifest, Progress};
use dsv4_model::contract::{OP_CONTRACT_NAME, WEIGHT_CONTRACT_NAME};
use serde_json::{Map, Value, json};

use crate::error::CompileError;

/// Shown of each kind; the rest is counted.
pub const SHOWN_MAX: usize = 20;
/// Longer values are cut for people and programs alike.
const VALUE_CHARS_MAX: usize = 200;
/// Order of the report.
const KINDS: [&str; 12] = [
    "ids",
    "tp",
    "config",
    "contracts",
    "meta",
    "kernels",
    "tuning",
    "canary",
    "sections",
    "tensors",
    "blocks",
    "weights",
];

/// One difference: where, and what each side has; `None` where a side has nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    pub at: String,
    pub a: Option<Value>,
    pub b: Option<Value>,
}

/// The differences of one kind.
#[derive(Clone, Debug, Default)]
pub struct Kind {
    pub count: u64,
    /// The first [`SHOWN_MAX`].
    pub shown: Vec<Item>,
}

/// The report.
pub struct Diff {
    a: (PathBuf, String),
    b: (PathBuf, String),
    kinds: BTreeMap<&'static str, Kind>,
    notes: Vec<String>,
}

/// Compares two artifacts.
///
/// Errors: a block that differs and cannot be read or does not have its hash, I/O.
pub fn diff(a: &Artifact, b: &Artifact, progress: &dyn Progress) -> Result<Diff, CompileError> {
    let side = |artifact: &Artifact| (artifact.path().to_path_buf(), artifact.manifest().artifact_id.to_string());
    let mut out = Diff { a: side(a), b: side(b), kinds: BTreeMap::new(), notes: Vec::new() };
    out.presence(a, b);
    if out.is_equal() {
        return Ok(out);
    }
    let (ma, mb) = (a.manifest(), b.manifest());
    out.ids(ma, mb);
    out.push_if_unequal("tp", "ranks", ma.tp, mb.tp);
    out.config(ma, mb);
    out.contracts(a, b)?;
    out.meta(a, b)?;
    out.kernels(a, b)?;
    out.canary(ma, mb);
    if ma.weights_seed.or(mb.weights_seed).is_some() {
        out.push_if_unequal("ids", "weights_seed", json!(ma.weights_seed), json!(mb.weights_seed));
        if ma.weight_set_id != mb.weight_set_id {
            out.note("weights that are made from a seed are not compared".into());
        }
    } else if ma.weight_set_id != mb.weight_set_id {
        weights::compare(&mut out, a, b, progress)?;
    }
    Ok(out)
}

impl Diff {
    /// Whether both are the same artifact.
    pub fn is_equal(&self) -> bool {
        self.a.1 == self.b.1
    }

    /// The differences of a kind; `None` when there are none.
    pub fn kind(&self, name: &str) -> Option<&Kind> {
        self.kinds.get(name)
    }

    /// What is not part of the identity, and what could not be compared.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// `Ok` for equal artifacts; [`CompileError::Differs`] otherwise.
    pub fn require_equal(&self) -> Result<(), CompileError> {
        if self.is_equal() {
            return Ok(());
        }
        Err(CompileError::Differs {
            a: self.a.0.clone(),
            b: self.b.0.clone(),
            expected: self.a.1.clone(),
            found: self.b.1.clone(),
        })
    }

    fn push(&mut self, kind: &'static str, at: impl Into<String>, a: Option<Value>, b: Option<Value>) {
        assert!(KINDS.contains(&kind), "{kind} is not among the kinds");
        let kind = self.kinds.entry(kind).or_default();
        kind.count += 1;
        if kind.shown.len() < SHOWN_MAX {
            kind.shown.push(Item { at: at.into(), a: a.map(shortened), b: b.map(shortened) });
        }
    }

    fn note(&mut self, text: String) {
        self.notes.push(text);
    }

    fn push_if_unequal<T: PartialEq + Into<Value>>(&mut self, kind: &'static str, at: impl Into<String>, a: T, b: T) {
        if a != b {
            self.push(kind, at, Some(a.into()), Some(b.into()));
        }
    }

    /// Files that are no part of the identity.
    fn presence(&mut self, a: &Artifact, b: &Artifact) {
        if a.present_ranks() != b.present_ranks() {
            let (a, b) = (a.present_ranks(), b.present_ranks());
            self.note(format!("files of ranks {a:?} are in the first, of {b:?} in the second"));
        }
        let frames =
            |m: &Manifest| -> Vec<_> { std::iter::once(&m.meta).chain(&m.kernel_files).map(|f| f.hash).collect() };
        if self.is_equal() && frames(a.manifest()) != frames(b.manifest()) {
            self.note("meta or kernels are compressed differently; their contents are the same".into());
        }
    }

    fn ids(&mut self, a: &Manifest, b: &Manifest) {
        self.push_if_unequal("ids", "artifact_id", a.artifact_id.to_string(), b.artifact_id.to_string());
        self.push_if_unequal("ids", "weight_set_id", a.weight_set_id.to_string(), b.weight_set_id.to_string());
        self.push_if_unequal("ids", "source_id", a.source_id.to_string(), b.source_id.to_string());
        self.push_if_unequal("ids", "kernel_set_id", a.kernel_set_id.to_string(), b.kernel_set_id.to_string());
        if a.weight_set_id != b.weight_set_id && a.source_id == b.source_id {
            self.note("both come from the same checkpoint tensors, cut or laid out differently".into());
        }
    }

    fn config(&mut self, a: &Manifest, b: &Manifest) {
        if a.config_json == b.config_json {
            return;
        }
        let found = texts::json("$", &a.config_json, &b.config_json);
        match found {
            Some(items) if items.is_empty() => self.note("config.json has its keys in another order".into()),
            Some(items) => self.extend("config", items),
            None => self.extend("config", texts::lines("config.json", &a.config_json, &b.config_json)),
        }
    }

    fn extend(&mut self, kind: &'static str, items: Vec<Item>) {
        for item in items {
            self.push(kind, item.at, item.a, item.b);
        }
    }

    fn contracts(&mut self, a: &Artifact, b: &Artifact) -> Result<(), CompileError> {
        let (ma, mb) = (a.manifest(), b.manifest());
        let contracts = [
            ("weight_contract", WEIGHT_CONTRACT_NAME, ma.weight_contract, mb.weight_contract),
            ("op_contract", OP_CONTRACT_NAME, ma.op_contract, mb.op_contract),
        ];
        for (name, member, ha, hb) in contracts {
            if ha == hb {
                continue;
            }
            self.push("contracts", name, Some(ha.to_string().into()), Some(hb.to_string().into()));
            match (a.meta(member)?, b.meta(member)?) {
                (Some(ta), Some(tb)) => self.extend("contracts", texts::contents(member, &ta, &tb)),
                _ => self.note(format!("{member} is not in both: what changed in the contract cannot be shown")),
            }
        }
        Ok(())
    }

    fn meta(&mut self, a: &Artifact, b: &Artifact) -> Result<(), CompileError> {
        let members = |artifact: &Artifact| -> BTreeMap<String, (u64, String)> {
            let members = artifact.manifest().meta.members.iter();
            members.map(|m| (m.name.clone(), (m.raw_len, m.raw_hash.to_string()))).collect()
        };
        let (ma, mb) = (members(a), members(b));
        let names: BTreeSet<_> = ma.keys().chain(mb.keys()).collect();
        for name in names {
            let shown = |side: &BTreeMap<String, (u64, String)>| {
                side.get(name).map(|(len, hash)| Value::from(format!("{len} bytes, {hash}")))
            };
            if ma.get(name) == mb.get(name) {
                continue;
            }
            self.push("meta", name, shown(&ma), shown(&mb));
            // Those are under "contracts", where it says what they mean.
            let contract = [WEIGHT_CONTRACT_NAME, OP_CONTRACT_NAME].contains(&name.as_str());
            if let (Some(ta), Some(tb), false) = (a.meta(name)?, b.meta(name)?, contract) {
                self.extend("meta", texts::contents(name, &ta, &tb));
            }
        }
        Ok(())
    }

    fn kernels(&mut self, a: &Artifact, b: &Artifact) -> Result<(), CompileError> {
        type Families<'m> = BTreeMap<(&'m str, &'m str), Vec<&'m KernelRecord>>;
        let (ka, kb) = (&a.manifest().kernels, &b.manifest().kernels);
        // Both are sorted so.
        fn find<'m>(among: &'m [KernelRecord], k: &KernelRecord) -> Option<&'m KernelRecord> {
            among.binary_search_by(|o| (&o.arch, o.key).cmp(&(&k.arch, k.key))).ok().and_then(|at| among.get(at))
        }
        fn add<'m>(to: &mut Families<'m>, k: &'m KernelRecord) {
            to.entry((&k.arch, &k.family)).or_default().push(k);
        }
        // By key the same kernel: a compiler that gives other bytes for the same input.
        let (mut only_a, mut only_b) = (Families::new(), Families::new());
        for k in ka {
            match find(kb, k) {
                None => add(&mut only_a, k),
                Some(o) if (&o.family, o.hash) == (&k.family, k.hash) => {}
                Some(o) => {
                    let shown = |k: &KernelRecord| Some(Value::from(format!("{}, cubin {}", k.family, k.hash)));
                    self.push("kernels", format!("{} key {}", k.arch, k.key), shown(k), shown(o));
                }
            }
        }
        kb.iter().filter(|k| find(ka, k).is_none()).for_each(|k| add(&mut only_b, k));
        // By family: other sources, constants, options or compiler, of which the key is the hash.
        let names: BTreeSet<_> = only_a.keys().chain(only_b.keys()).copied().collect();
        for (arch, family) in names {
            let count = |side: &Families<'_>| side.get(&(arch, family)).map_or(0, Vec::len);
            for i in 0..count(&only_a).max(count(&only_b)) {
                let key = |side: &Families<'_>| {
                    side.get(&(arch, family))
                        .and_then(|keys| keys.get(i))
                        .map(|k| Value::from(format!("key {}", k.key)))
                };
                self.push("kernels", format!("{arch} {family}"), key(&only_a), key(&only_b));
            }
        }
        let arches: BTreeSet<&str> = ka.iter().chain(kb).map(|k| k.arch.as_str()).collect();
        for arch in arches {
            match (a.tuning(arch)?, b.tuning(arch)?) {
                (Some(ta), Some(tb)) => self.extend("tuning", texts::contents(arch, &ta, &tb)),
                (None, None) => {}
                (ta, tb) => {
                    let shown = |t: Option<Vec<u8>>| t.map(|t| Value::from(format!("{} bytes", t.len())));
                    self.push("tuning", arch, shown(ta), shown(tb));
                }
            }
        }
        Ok(())
    }

    fn canary(&mut self, a: &Manifest, b: &Manifest) {
        let (Some(ca), Some(cb)) = (&a.canary, &b.canary) else {
            if a.canary != b.canary {
                let shown = |m: &Manifest| m.canary.as_ref().map(|c| Value::from(format!("{} tokens", c.tokens.len())));
                self.push("canary", "canary", shown(a), shown(b));
            }
            return;
        };
        self.push_if_unequal("canary", "tokens", json!(ca.tokens), json!(cb.tokens));
        self.push_if_unequal("canary", "logits", ca.logits.len(), cb.logits.len());
        let pairs = ca.logits.iter().zip(&cb.logits).enumerate();
        for (i, (x, y)) in pairs.filter(|(_, (x, y))| x.to_bits() != y.to_bits()) {
            self.push("canary", format!("logit {i}"), Some((*x).into()), Some((*y).into()));
        }
    }

    /// The report for programs; keys are only ever added.
    pub fn to_json(&self) -> Value {
        let side = |(path, id): &(PathBuf, String)| json!({"path": path.display().to_string(), "artifact_id": id});
        let mut kinds = Map::new();
        for (name, kind) in self.ordered() {
            let item = |item: &Item| {
                let mut out = Map::from_iter([("at".to_owned(), Value::from(item.at.clone()))]);
                out.extend(item.a.clone().map(|a| ("a".to_owned(), a)));
                out.extend(item.b.clone().map(|b| ("b".to_owned(), b)));
                Value::from(out)
            };
            let shown: Vec<Value> = kind.shown.iter().map(item).collect();
            kinds.insert(name.into(), json!({"count": kind.count, "shown": shown}));
        }
        json!({
            "equal": self.is_equal(), "a": side(&self.a), "b": side(&self.b),
            "differences": kinds, "notes": self.notes,
        })
    }

    /// The report for people.
    pub fn to_text(&self) -> String {
        let mut out = String::new();
        let (a, b) = (self.a.0.display(), self.b.0.display());
        // Writing to a String cannot fail.
        let _ = match self.is_equal() {
            true => writeln!(out, "{a} and {b} are the same artifact {}", self.a.1),
            false => writeln!(out, "a is {a}\nb is {b}"),
        };
        for (name, kind) in self.ordered() {
            let _ = writeln!(out, "{name}: {} differ", kind.count);
            for item in &kind.shown {
                let shown = |value: &Option<Value>| value.as_ref().map_or("(nothing)".into(), as_text);
                let _ = writeln!(out, "  {}\n    a: {}\n    b: {}", item.at, shown(&item.a), shown(&item.b));
            }
            let rest = kind.count - kind.shown.len() as u64;
            if rest > 0 {
                let _ = writeln!(out, "  and {rest} more");
            }
        }
        for note in &self.notes {
            let _ = writeln!(out, "note: {note}");
        }
        out
    }

    fn ordered(&self) -> impl Iterator<Item = (&'static str, &Kind)> {
        KINDS.iter().filter_map(|&name| Some((name, self.kinds.get(name)?)))
    }
}

/// Texts as they are, everything else as JSON.
fn as_text(value: &Value) -> String {
    match value {
        Value::String(text) => text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect(),
        other => other.to_string(),
    }
}

/// The value, or the beginning of its text.
fn shortened(value: Value) -> Value {
    let text = as_text(&value);
    if text.chars().nth(VALUE_CHARS_MAX).is_none() {
        return value;
    }
    let start: String = text.chars().take(VALUE_CHARS_MAX).collect();
    Value::String(format!("{start}…"))
}
