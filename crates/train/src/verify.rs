//! A second opinion on the compiler: a step is run compiled and by its plain meaning, and compared.
//!
//! Where they disagree, passes are switched off one after the other until they agree, which names the pass; then the
//! graph is cut down to the first operation that comes out differently and the few before it, which makes a small
//! reproduction. The plain meaning is the interpreter's, in f64, where the step is small enough for it, and otherwise
//! the same kernels node by node.

use crate::Error;
use crate::data::PackedRows;
use crate::learner::{Fed, Learner};
use crate::optim::RATES;
use sparsam_dtype::codec;
use sparsam_formats::{AtomicFile, TensorSpec, safetensors};
use sparsam_ir::interpret::{Leaves, Rounding, Value, interpret};
use sparsam_ir::{AdamW, DType, Graph, Muon, Node, NodeId, Op, Precision};
use sparsam_runtime::{Data, Device, Options, Pass, Session, Weights};
use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How far apart two results may be: norm of the difference over the norm of the result. Sums of a training step in f32
/// differ by a few 1e-6 with their order (measured up to 3e-6 on the models of the tests); a wrong pass is off by far
/// more than this.
pub const TOLERANCE: f64 = 1e-3;
/// Element operations up to which a step is interpreted: about ten seconds.
const INTERPRETED_OPS: f64 = 5e8;
/// Operations before the wrong one that a reproduction may hold.
const DEPTH: usize = 12;

/// Results by name, and the states that the graph writes.
pub type Values = HashMap<String, Vec<f32>>;

/// Everything that a graph reads, as it was before a step.
pub struct Frozen {
    device: Device,
    constants: Arc<Weights>,
    leaves: HashMap<String, (Vec<usize>, DType, Vec<u8>)>,
}

impl Frozen {
    /// What `learner`'s step would read on `rows`.
    ///
    /// # Errors
    /// None that a learner's own states can cause.
    pub fn new(learner: &mut Learner, rows: &PackedRows, t: u64, lr: f64) -> Result<Frozen, Error> {
        let mut leaves = HashMap::new();
        let scale = [1.0 / rows.n_targets().max(1) as f32];
        let rates = learner.how().optimiser.adamw.rates(lr, t);
        let fed = Fed::new(rows, &learner.how().targets);
        let given = fed.inputs(&scale).into_iter().chain([(RATES, Data::F32(&rates))]);
        for (name, data) in given {
            let (n, dtype, bytes) = match data {
                Data::F32(x) => (x.len(), DType::F32, bytemuck::cast_slice(x).to_vec()),
                Data::I32(x) => (x.len(), DType::I32, bytemuck::cast_slice(x).to_vec()),
                Data::Bytes(_) => continue,
            };
            leaves.insert(name.to_string(), (vec![n], dtype, bytes));
        }
        for c in learner.model().constants() {
            leaves.insert(c.name, (c.shape, DType::F32, bytemuck::cast_slice(&c.data).to_vec()));
        }
        let session = learner.session();
        let states: Vec<_> =
            session.states().map(|(name, shape, dtype)| (name.to_string(), shape.to_vec(), dtype)).collect();
        for (name, shape, dtype) in states {
            let bytes = session.state_bytes(&name)?.to_vec();
            leaves.insert(name, (shape, dtype, bytes));
        }
        Ok(Frozen { device: session.device().clone(), constants: session.weights().clone(), leaves })
    }

    /// Results of `graph` by the kernels.
    ///
    /// # Errors
    /// Graphs that do not compile.
    pub fn run(&self, graph: &Graph, options: &Options) -> Result<Values, Error> {
        let mut session = Session::new(&self.device, self.constants.clone());
        let step = session.load(graph, options)?;
        let states: Vec<String> = session.states().map(|(name, ..)| name.to_string()).collect();
        for name in &states {
            if let Some((_, _, bytes)) = self.leaves.get(name) {
                session.set_state(name, bytes)?;
            }
        }
        let given: Vec<(&str, Data)> = step
            .inputs()
            .filter_map(|(name, ..)| self.leaves.get(name).map(|(_, _, bytes)| (name, Data::Bytes(bytes))))
            .collect();
        let out = session.run(&step, &given)?;
        let mut values = Values::new();
        for (name, ..) in step.outputs() {
            values.insert(name.to_string(), out.to_f32(name)?);
        }
        let dtypes: HashMap<String, DType> =
            session.states().map(|(name, _, dtype)| (name.to_string(), dtype)).collect();
        for name in written(graph) {
            let bytes = session.state_bytes(&name)?;
            let dtype = dtypes.get(&name).copied().unwrap_or(DType::F32);
            values.insert(name, numbers(dtype, bytes));
        }
        Ok(values)
    }

    /// Results of `graph` by the interpreter, in f64.
    ///
    /// # Errors
    /// Indices outside of their tables.
    pub fn interpret(&self, graph: &Graph) -> Result<Values, Error> {
        let value = |(shape, dtype, bytes): &(Vec<usize>, DType, Vec<u8>)| match dtype {
            DType::I32 => Value::from_i32(shape, bytemuck::cast_slice(bytes)),
            _ => Value::from_f32(shape, &numbers(*dtype, bytes)),
        };
        let mut leaves: Leaves = self.leaves.iter().map(|(name, leaf)| (name.clone(), value(leaf))).collect();
        let out = interpret(graph, &mut leaves, Rounding::None)?;
        let states = written(graph).into_iter().filter_map(|name| leaves.remove(&name).map(|v| (name, v)));
        let floats = |v: Value| v.data.into_iter().map(|x| x as f32).collect::<Vec<f32>>();
        // What a state in blocks holds of its new value.
        let kept = |(name, v): (String, Value)| {
            let dtype = self.leaves.get(&name).map_or(DType::F32, |leaf| leaf.1);
            let mut bytes =
                vec![0; if dtype.is_block() { dtype.bytes_for(v.data.len()).unwrap_or(0) } else { 0 }];
            let x = floats(v);
            match dtype.is_block() && codec::encode(dtype, &x, &mut bytes).is_ok() {
                true => (name, numbers(dtype, &bytes)),
                false => (name, x),
            }
        };
        Ok(out.into_iter().map(|(name, v)| (name, floats(v))).chain(states.map(kept)).collect())
    }

    /// The same with more leaves.
    fn with(&self, inputs: &[Leaf]) -> Frozen {
        let mut leaves = self.leaves.clone();
        leaves.extend(inputs.iter().map(|l| (l.name.clone(), (l.shape.clone(), l.dtype, l.bytes.clone()))));
        Frozen { device: self.device.clone(), constants: self.constants.clone(), leaves }
    }

    /// The plain meaning of `graph`, its products in `precision` (`None`: as written).
    fn reference(&self, graph: &Graph, precision: Option<Precision>) -> Result<Values, Error> {
        if precision.is_none() && operations(graph) <= INTERPRETED_OPS {
            self.interpret(graph)
        } else {
            self.run(graph, &Options { precision, ..Options::eager() })
        }
    }
}

/// The numbers of a leaf in F32 or in blocks.
fn numbers(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    if !dtype.is_block() {
        return bytemuck::cast_slice(bytes).to_vec();
    }
    let mut x = vec![0.0; bytes.len() / dtype.block_bytes() * dtype.block_len()];
    codec::decode(dtype, bytes, &mut x).expect("a state's bytes are whole blocks");
    x
}

/// Names of the states that a graph writes.
fn written(graph: &Graph) -> Vec<String> {
    let name = |id: &NodeId| match graph.state_of(*id).map(|s| &graph.node(s).op) {
        Some(Op::State { name, .. }) => Some(name.clone()),
        _ => None,
    };
    graph.writes.iter().filter_map(name).collect()
}

/// About how many operations on single elements the interpreter would make.
fn operations(graph: &Graph) -> f64 {
    let of = |n: &Node| {
        let numel = n.numel() as f64;
        let dim = |i: usize, axis: usize| {
            n.inputs.get(i).and_then(|id| graph.node(*id).shape.get(axis)).copied().unwrap_or(1) as f64
        };
        match &n.op {
            Op::Matmul { trans_a, .. } => {
                let rank = n.shape.len();
                numel * dim(0, if *trans_a { rank - 2 } else { rank - 1 })
            }
            Op::CrossEntropy { .. } => dim(0, 0) * dim(0, 1) * dim(1, 0) * 2.0,
            Op::Attention(_) => numel * dim(0, 0) * 2.0,
            _ => numel,
        }
    };
    graph.nodes.iter().map(of).sum()
}

/// What the comparison says.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// The result that is furthest off, and how far (see [`TOLERANCE`]).
    pub worst: (String, f64),
    /// Passes to leave out so that both agree; empty where they do already. All of them where no single one explains it.
    pub off: Vec<Pass>,
    /// The operation that first comes out differently, as text, with the line of code that recorded it.
    pub op: Option<String>,
    /// Where the reproduction is.
    pub reproduction: Option<PathBuf>,
}

impl Verdict {
    /// Whether compiled and plain agree.
    pub fn agrees(&self) -> bool {
        self.off.is_empty()
    }
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (name, off) = &self.worst;
        if self.agrees() {
            return write!(f, "compiled and plain agree (furthest off: {name}, by {off:.1e})");
        }
        let passes: Vec<&str> = self.off.iter().map(|p| p.name()).collect();
        write!(
            f,
            "compiled and plain disagree: {name} is off by {off:.1e}; without pass {} they agree",
            passes.join(", ")
        )?;
        if let Some(op) = &self.op {
            write!(f, "; the first result that differs is {op}")?;
        }
        match &self.reproduction {
            Some(path) => write!(f, "; reproduction in {}", path.display()),
            None => Ok(()),
        }
    }
}

/// Compares `graph` compiled with `options` to its plain meaning on `frozen`. A reproduction is written into `folder`.
///
/// # Errors
/// Graphs that do not compile at all; full disks.
pub fn second_opinion(
    graph: &Graph,
    frozen: &Frozen,
    options: &Options,
    folder: &Path,
) -> Result<Verdict, Error> {
    judge(graph, frozen, options, folder, &Frozen::run)
}

/// Runs a graph compiled; tests put a broken compiler here.
type Compiled<'a> = &'a dyn Fn(&Frozen, &Graph, &Options) -> Result<Values, Error>;

fn judge(
    graph: &Graph,
    frozen: &Frozen,
    options: &Options,
    folder: &Path,
    compiled: Compiled,
) -> Result<Verdict, Error> {
    let plain = frozen.reference(graph, options.precision)?;
    let worst = furthest(&plain, &compiled(frozen, graph, options)?);
    if worst.1 <= TOLERANCE {
        return Ok(Verdict { worst, off: Vec::new(), op: None, reproduction: None });
    }
    let mut found = Pass::ALL.to_vec();
    for pass in Pass::ALL.into_iter().filter(|p| !options.off.contains(p)) {
        let mut without = options.clone();
        without.off.push(pass);
        // Without some pass the step may not keep to its budget of memory: then that one cannot be left out.
        let Ok(values) = compiled(frozen, graph, &without) else { continue };
        if furthest(&plain, &values).1 <= TOLERANCE {
            found = without.off;
            break;
        }
    }
    let small = shrink(graph, frozen, &Options { memory: None, ..options.clone() }, compiled)?;
    let (op, reproduction) = match small {
        None => (None, None),
        Some(small) => {
            let text = small.graph.nodes.last().map(|n| format!("{} (traced at {})", small.op, n.at));
            (text, Some(small.write(folder, frozen, &found)?))
        }
    };
    Ok(Verdict { worst, off: found, op, reproduction })
}

/// The result that is furthest off: norm of the difference over the norm of `a`. What is no number is infinitely far.
///
/// Weights with moments are left out: where a gradient is next to nothing, dividing it by its own root makes a step of
/// its rounding. Their moments tell all that there is to tell.
fn furthest(a: &Values, b: &Values) -> (String, f64) {
    let mut worst = (String::new(), 0.0);
    let has_moments =
        |name: &str| a.contains_key(&AdamW::moments(name)[0]) || a.contains_key(&Muon::momentum(name));
    let mut names: Vec<&String> = a.keys().filter(|name| !has_moments(name)).collect();
    names.sort();
    for name in names {
        let off = match b.get(name) {
            Some(b) => distance(&a[name], b),
            None => f64::INFINITY,
        };
        if off > worst.1 || worst.0.is_empty() {
            worst = (name.clone(), off);
        }
    }
    worst
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let off: f64 = a.iter().zip(b).map(|(x, y)| square(*x as f64 - *y as f64)).sum();
    let norm: f64 = a.iter().map(|x| square(*x as f64)).sum();
    let d = off.sqrt() / norm.sqrt().max(1e-30);
    if off == 0.0 {
        0.0
    } else if d.is_nan() || a.len() != b.len() {
        f64::INFINITY
    } else {
        d
    }
}

/// A part of a graph that comes out differently: some nodes have become inputs.
struct Small {
    graph: Graph,
    op: String,
    inputs: Vec<Leaf>,
}

/// A value that a cut graph reads.
struct Leaf {
    name: String,
    shape: Vec<usize>,
    dtype: DType,
    bytes: Vec<u8>,
}

/// The name of the one result of a cut graph.
const RESULT: &str = "result";

/// Bytes of results that are looked at in one run while the first wrong one is searched.
const SEARCH_BYTES: usize = 256 << 20;

/// Finds the first node that comes out differently, then as few nodes before it as show the difference. `None` if none
/// does alone: then only their combination differs.
fn shrink(
    graph: &Graph,
    frozen: &Frozen,
    options: &Options,
    compiled: Compiled,
) -> Result<Option<Small>, Error> {
    let live = graph.live();
    let mut nodes = graph.ids().filter(|id| {
        let n = graph.node(*id);
        live[id.index()] && n.dtype == DType::F32 && !n.inputs.is_empty() && !n.op.writes_state()
    });
    let wrong = loop {
        let (mut some, mut bytes) = (Vec::new(), 0);
        while bytes < SEARCH_BYTES
            && let Some(id) = nodes.next()
        {
            bytes += graph.node(id).bytes();
            some.push(id);
        }
        let Some(last) = some.last() else { return Ok(None) };
        // No node before the last one needs what comes behind it.
        let mut part = Graph { nodes: graph.nodes[..=last.index()].to_vec(), ..Graph::default() };
        part.outputs = some.iter().map(|id| (id.0.to_string(), *id)).collect();
        let (plain, other) = (frozen.reference(&part, options.precision)?, compiled(frozen, &part, options)?);
        let differs =
            |id: &NodeId| distance(&plain[&id.0.to_string()], &other[&id.0.to_string()]) > TOLERANCE;
        if let Some(wrong) = some.iter().find(|id| differs(id)) {
            break *wrong;
        }
    };
    for depth in 1..=DEPTH {
        let small = cut(graph, wrong, depth, frozen, options.precision)?;
        let inside = frozen.with(&small.inputs);
        let plain = inside.reference(&small.graph, options.precision)?;
        if furthest(&plain, &compiled(&inside, &small.graph, options)?).1 > TOLERANCE {
            return Ok(Some(small));
        }
    }
    Ok(None)
}

/// Node `id` of `graph` and what leads to it within `depth` operations; what lies further back becomes inputs with the
/// values that it has.
fn cut(
    graph: &Graph,
    id: NodeId,
    depth: usize,
    frozen: &Frozen,
    precision: Option<Precision>,
) -> Result<Small, Error> {
    let (mut kept, mut edge) = (HashSet::from([id]), vec![id]);
    for _ in 1..depth {
        edge =
            edge.iter().flat_map(|id| graph.node(*id).inputs.clone()).filter(|id| kept.insert(*id)).collect();
    }
    let is_leaf = |id: NodeId| graph.node(id).inputs.is_empty();
    let border: Vec<NodeId> = graph
        .ids()
        .filter(|id| !kept.contains(id) && !is_leaf(*id))
        .filter(|id| kept.iter().any(|k| graph.node(*k).inputs.contains(id)))
        .collect();
    // The values of the border, by the plain meaning.
    let mut wanted = Graph { nodes: graph.nodes.clone(), ..Graph::default() };
    wanted.outputs = border.iter().map(|id| (format!("cut.{}", id.0), *id)).collect();
    let values = if border.is_empty() { Values::new() } else { frozen.reference(&wanted, precision)? };
    let mut inputs = Vec::new();
    let mut small = Graph::default();
    let mut renamed: HashMap<NodeId, NodeId> = HashMap::new();
    for old in graph.ids().filter(|o| *o <= id) {
        let node = graph.node(old);
        let reached = kept.contains(&old) || kept.iter().any(|k| graph.node(*k).inputs.contains(&old));
        if !reached {
            continue;
        }
        let mut new = node.clone();
        if border.contains(&old) {
            let name = format!("cut.{}", old.0);
            let bytes = match node.dtype {
                DType::I32 => {
                    let whole: Vec<i32> = values[&name].iter().map(|x| *x as i32).collect();
                    bytemuck::cast_slice(&whole).to_vec()
                }
                _ => bytemuck::cast_slice(&values[&name]).to_vec(),
            };
            let (shape, dtype) =
                (node.shape.clone(), if node.dtype == DType::I32 { DType::I32 } else { DType::F32 });
            new.op = Op::Input { name: name.clone(), shape: shape.clone(), dtype };
            new.inputs = Vec::new();
            new.dtype = dtype;
            inputs.push(Leaf { name, shape, dtype, bytes });
        } else {
            new.inputs = node.inputs.iter().map(|i| renamed[i]).collect();
            if let Op::Input { name, .. } | Op::Weight { name, .. } | Op::State { name, .. } = &node.op
                && let Some((shape, dtype, bytes)) = frozen.leaves.get(name)
            {
                inputs.push(Leaf {
                    name: name.clone(),
                    shape: shape.clone(),
                    dtype: *dtype,
                    bytes: bytes.clone(),
                });
            }
        }
        small.nodes.push(new);
        renamed.insert(old, NodeId(small.nodes.len() as u32 - 1));
    }
    small.outputs = vec![(RESULT.into(), renamed[&id])];
    let text = small.to_string();
    let last = text.lines().rfind(|l| l.trim_start().starts_with('%'));
    let op = last.unwrap_or_default().trim().to_string();
    Ok(Small { graph: small, op, inputs })
}

impl Small {
    /// Writes `reproduction.txt` (the graph, and which passes) and `reproduction.safetensors` (what it reads).
    fn write(&self, folder: &Path, frozen: &Frozen, passes: &[Pass]) -> Result<PathBuf, Error> {
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let specs: Vec<TensorSpec> = self
            .inputs
            .iter()
            .map(|l| match l.dtype.is_block() {
                // The file knows no blocks of states: as they lie.
                true => TensorSpec { name: l.name.clone(), shape: vec![l.bytes.len()], dtype: DType::U8 },
                false => TensorSpec { name: l.name.clone(), shape: l.shape.clone(), dtype: l.dtype },
            })
            .collect();
        let mut writer = safetensors::Writer::create(folder.join("reproduction.safetensors"), &[], &specs)?;
        for leaf in &self.inputs {
            writer.append(&leaf.name, &leaf.bytes)?;
        }
        writer.finish()?;
        let names: Vec<&str> = passes.iter().map(|p| p.name()).collect();
        let text = format!(
            "sparsam {}, {:?}\nCompiled and plain meaning disagree on {RESULT:?}; they agree without: {}\n\
             The values of the leaves are in reproduction.safetensors.\n\n{}",
            env!("CARGO_PKG_VERSION"),
            frozen.device,
            names.join(", "),
            self.graph
        );
        let path = folder.join("reproduction.txt");
        let mut file = AtomicFile::create(&path)?;
        file.write_all(text.as_bytes()).map_err(Error::io("write", &path))?;
        file.commit()?;
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::Optimiser;
    use crate::{How, new};
    use sparsam_ir::Unary;
    use sparsam_models::Model;

    fn frozen() -> (Learner, Frozen, Graph) {
        let mut c = crate::config::ModelConfig {
            arch: Some(crate::config::Arch::Gpt2),
            layers: Some(1),
            hidden: Some(16),
            ..Default::default()
        };
        let model = Model::new(new::configure(&mut c, 20, 8).unwrap());
        let how = How {
            rows: 2,
            ctx: 8,
            accumulate: 1,
            targets: Default::default(),
            processes: 1,
            optimiser: Optimiser::default(),
            samples: false,
            options: Options::default(),
        };
        let mut learner = Learner::new(&model, how, &Device::cpu(1).unwrap()).unwrap();
        learner.initialise(1).unwrap();
        let mut rows = PackedRows::default();
        for row in 0..2u32 {
            let window: Vec<u32> = (0..9).map(|i| (i * 7 + row * 3) % 20).collect();
            rows.push(&window, None);
        }
        let frozen = Frozen::new(&mut learner, &rows, 1, 1e-3).unwrap();
        let graph = learner.graphs().unwrap().whole.unwrap();
        (learner, frozen, graph)
    }

    #[test]
    fn the_compiler_agrees_with_the_interpreter() {
        let (_, frozen, graph) = frozen();
        let dir = tempfile::tempdir().unwrap();
        let verdict = second_opinion(&graph, &frozen, &Options::default(), dir.path()).unwrap();
        assert!(verdict.agrees() && verdict.worst.1 < 1e-4, "{verdict}");
        // Node by node, too: the other reference.
        let eager = frozen.run(&graph, &Options::eager()).unwrap();
        assert!(furthest(&frozen.interpret(&graph).unwrap(), &eager).1 < 1e-4);
    }

    /// A compiler whose fusion takes tanh for exp.
    fn broken(frozen: &Frozen, graph: &Graph, options: &Options) -> Result<Values, Error> {
        let mut graph = graph.clone();
        if !options.off.contains(&Pass::Fuse) {
            for node in &mut graph.nodes {
                if node.op == Op::Unary(Unary::Tanh) {
                    node.op = Op::Unary(Unary::Exp);
                }
            }
        }
        frozen.run(&graph, options)
    }

    #[test]
    fn a_broken_pass_is_named_with_the_operation_and_a_reproduction() {
        let (_, frozen, graph) = frozen();
        let dir = tempfile::tempdir().unwrap();
        let v = judge(&graph, &frozen, &Options::default(), dir.path(), &broken).unwrap();
        assert_eq!(v.off, [Pass::Fuse], "{v}");
        assert!(v.op.as_ref().unwrap().contains("tanh"), "{v}");
        let text = std::fs::read_to_string(v.reproduction.unwrap()).unwrap();
        assert!(text.contains("without: fuse") && text.lines().count() < 16, "{text}");
        let file = safetensors::File::open(dir.path().join("reproduction.safetensors")).unwrap();
        assert_eq!(file.tensors().len(), 1);
    }
}
