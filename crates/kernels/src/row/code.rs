//! From a program to tile code: axes merged, tiles chosen, registers given out.
//!
//! **Tiles.** Wide values live in *registers* of one tile each: `no x ni` rows of `pitch` f32, or a piece of one long
//! row. F32 operands whose rows are contiguous are read and written where they lie. A tile is as large as lets all
//! that an instruction list touches stay in L1 ([`L1_BYTES`]): larger tiles spread the cost of choosing the next
//! instruction (about 4 ns) over more elements, smaller ones stay nearer.
//!
//! **Long rows.** A row with reductions is held whole while its registers fit [`ROW_BYTES`] of L2. Beyond that it is
//! run in pieces, once for each level of reductions (a softmax: maximum, sum, result), and wide values that a later
//! level needs are computed again from the loads: an exp costs 0.15 ns an element where a round trip to L3 or memory
//! costs 0.1 to 0.3, and memory stays free.
//!
//! **Order of sums.** Within a row (or a piece of one): by lanes, four vectors in turn, folded at the end. Pieces are
//! added up in order, in f64. Column sums: rows in order within a slab of tiles, then slabs in order. All of that
//! follows from the program and the layouts alone.

use super::nodes::{Node, StoreTo, count_uses, fuse, translate};
use super::program::{Class, Program, Store, repeats_last};
use sparsam_dtype::{DType, Layout};

/// What the operands of one tile may take of L1 (32 KiB on every x86-64 of the last ten years).
const L1_BYTES: usize = 24 * 1024;

/// Largest tile: 8 KiB, beyond which nothing is gained.
const MAX_TILE: usize = 2048;

/// Smallest: below it the choice of instructions costs as much as they do.
const MIN_TILE: usize = 512;

/// What the registers of one whole row may take: half of a 256 KiB L2.
const ROW_BYTES: usize = 128 * 1024;

/// Most rows of one tile (of very short ones).
const MAX_ROWS: usize = 256;

/// An operation of tile code. Wide operands are vectors along the row, narrow ones numbers, and likewise for narrow
/// operations, whose vectors run along the rows of the tile.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Op {
    Load {
        dtype: DType,
        step: usize,
    },
    Const(f32),
    IotaColumn,
    /// `row / div % n`.
    IotaRow {
        div: usize,
        n: usize,
    },
    /// The key lies `step` apart.
    Random {
        seed: usize,
        stream: u32,
        step: usize,
    },
    Round(DType),
    Neg,
    Abs,
    Recip,
    Sqrt,
    Exp,
    Log,
    Sin,
    Cos,
    Tanh,
    Erf,
    Floor,
    Sigmoid,
    Silu,
    Add,
    Sub,
    Mul,
    Div,
    Max,
    Min,
    Less,
    Equal,
    /// `e^(a - b)`
    ExpSub,
    /// `silu(a) * b`
    SiluMul,
    /// `a * b + c`
    Fma,
    /// `a * b - c`
    Fms,
    /// `c - a * b`
    Fnma,
    /// `a * b * c`
    Mul3,
    /// `a / (sqrt(b) + c)`, `c` a number: an optimiser's step
    DivRoot,
    Select,
    RowSum,
    RowMax,
    /// `sum(a * b)`
    RowDot,
    /// A narrow value fills all columns of a `wide` output.
    Store {
        dtype: DType,
        step: usize,
        wide: bool,
    },
    ColumnSum,
}

impl Op {
    pub fn is_reduction(self) -> bool {
        matches!(self, Op::RowSum | Op::RowMax | Op::RowDot)
    }
}

/// One instruction of tile code; operands are indices of slots.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ins {
    pub op: Op,
    /// Whether it runs along the rows of the tile (narrow) instead of along the columns.
    pub narrow: bool,
    /// Whether all vectors of the tile lie end to end: one long row.
    pub flat: bool,
    /// Which of the arguments are vectors.
    pub vector: [bool; 3],
    pub dst: u16,
    pub args: [u16; 3],
}

/// Where an operand lies: its type, and elements between neighbours along each axis.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub dtype: DType,
    /// Along each leading axis of the domain.
    pub lead: Vec<usize>,
    /// Along the row.
    pub step: usize,
    /// Whether it has an element for each column.
    pub wide: bool,
}

/// A level of reductions.
#[derive(Clone, Debug, Default)]
pub(super) struct Phase {
    /// Once a row, before the pieces.
    pub narrow: Vec<Ins>,
    /// For each piece.
    pub piece: Vec<Ins>,
    /// Reductions that the pieces give parts of: narrow register, and whether it is a sum.
    pub reduces: Vec<(usize, bool)>,
}

/// Instruction lists for one way of storing.
#[derive(Clone, Debug)]
pub(super) struct Stream {
    /// Once for all rows.
    pub uniform: Vec<Ins>,
    /// Without pieces: one, whose `piece` list is all there is.
    pub phases: Vec<Phase>,
    /// Once a row, after all pieces.
    pub end: Vec<Ins>,
    /// Wide registers.
    pub wide: usize,
    /// (output, input) such that the output is written before the input's last read: this stream is wrong if they
    /// are the same view.
    pub hazards: Vec<(usize, usize)>,
}

/// Tile code.
#[derive(Clone, Debug)]
pub(super) struct Tiled {
    /// Leading axes after merging, and the length of a row.
    pub lead: Vec<usize>,
    pub width: usize,
    /// Rows of a tile along the last leading axis and along the one before.
    pub ni: usize,
    pub no: usize,
    /// Elements of a piece; `width` if rows are held whole.
    pub piece: usize,
    /// f32 from row to row of a register.
    pub pitch: usize,
    /// Initial uniform registers: constants in place.
    pub uniforms: Vec<f32>,
    pub narrows: usize,
    pub ins: Vec<Place>,
    pub outs: Vec<Place>,
    /// Column sums: (output, whether it has an element for each column, whether the value has).
    pub sums: Vec<ColumnSum>,
    /// Writes outputs where they lie as early as it can.
    pub fast: Stream,
    /// For in-place calls in which `fast` would be wrong.
    pub safe: Option<Box<Stream>>,
}

/// One output that sums over all rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct ColumnSum {
    pub output: usize,
    /// First f32 in a slab's sums.
    pub at: usize,
    /// Whether the value is wide.
    pub wide: bool,
}

impl Tiled {
    /// Rows of the domain.
    pub fn rows(&self) -> usize {
        self.lead.iter().product()
    }

    /// Whether rows are run in pieces.
    pub fn in_pieces(&self) -> bool {
        self.piece < self.width
    }

    /// f32 of one register.
    pub fn register(&self) -> usize {
        if self.in_pieces() { self.piece } else { self.no * self.ni * self.pitch }
    }

    /// Rows of a tile, and so f32 of a narrow register.
    pub fn tile_rows(&self) -> usize {
        self.no * self.ni
    }

    /// f32 of one slab's column sums.
    pub fn sums_len(&self) -> usize {
        self.sums.last().map_or(0, |s| s.at + if s.wide { self.width.next_multiple_of(16) } else { 16 })
    }

    /// Tiles along the leading axes: blocks of the last one, of the one before, and the count of all.
    pub fn blocks(&self) -> (usize, usize, usize) {
        let m = self.lead.len();
        let inner = if m > 0 { self.lead[m - 1].div_ceil(self.ni) } else { 1 };
        let outer = if m > 1 { self.lead[m - 2].div_ceil(self.no) } else { 1 };
        (inner, outer, inner * outer * self.lead[..m.saturating_sub(2)].iter().product::<usize>())
    }

    // Slots, in this order: uniform and narrow registers, inputs, outputs, column sums, wide registers.
    pub fn narrow_slot(&self, i: usize) -> usize {
        self.uniforms.len() + i
    }
    pub fn in_slot(&self, i: usize) -> usize {
        self.narrow_slot(self.narrows) + i
    }
    pub fn out_slot(&self, i: usize) -> usize {
        self.in_slot(self.ins.len()) + i
    }
    pub fn sum_slot(&self, i: usize) -> usize {
        self.out_slot(self.outs.len()) + i
    }
    pub fn wide_slot(&self, i: usize) -> usize {
        self.sum_slot(self.sums.len()) + i
    }
}

/// The domain and operands as the tiles see them: leading axes merged, the row too where nothing forbids it.
struct Domain {
    lead: Vec<usize>,
    width: usize,
    ins: Vec<Place>,
    outs: Vec<Place>,
}

/// Compiles a checked program.
pub(super) fn compile(
    program: &Program,
    classes: &[Class],
    ins: &[(DType, &Layout)],
    outs: &[(DType, &Layout)],
) -> Tiled {
    let (mut nodes, at) = translate(program, classes, ins);
    let stores: Vec<StoreTo> = program
        .stores
        .iter()
        .map(|&(output, v, how)| StoreTo { output, node: at[v as usize], sum: how == Store::ColumnSum })
        .collect();
    count_uses(&mut nodes, &stores);
    let mut domain = Domain::new(program, &nodes, &stores, ins, outs);
    domain.turn(&mut nodes, &stores);
    fuse(&mut nodes);
    count_uses(&mut nodes, &stores);
    domain.merge(&nodes, &stores);
    Build { nodes, stores, domain }.finish()
}

impl Domain {
    fn new(
        program: &Program,
        nodes: &[Node],
        stores: &[StoreTo],
        ins: &[(DType, &Layout)],
        outs: &[(DType, &Layout)],
    ) -> Domain {
        let rank = program.shape.len();
        let lead = program.shape[..rank.saturating_sub(1)].to_vec();
        let place = |dtype: DType, l: &Layout, used: bool, wide: bool| Place {
            dtype,
            lead: (0..lead.len()).map(|a| if used && l.shape[a] != 1 { l.strides[a] } else { 0 }).collect(),
            step: if l.shape.last() == Some(&1) { 0 } else { l.strides.last().copied().unwrap_or(0) },
            wide: used && wide,
        };
        let loaded =
            |i: usize| nodes.iter().any(|n| n.uses > 0 && matches!(n.op, Op::Load { .. }) && n.input == i);
        let rows = |o: usize| stores.iter().any(|s| s.output == o && !s.sum);
        let ins =
            ins.iter().enumerate().map(|(i, &(d, l))| place(d, l, loaded(i), !repeats_last(l))).collect();
        let width = program.width();
        let outs = outs
            .iter()
            .enumerate()
            .map(|(o, &(d, l))| {
                place(d, l, rows(o) && l.shape.len() == rank, l.shape.last().copied().unwrap_or(1) == width)
            })
            .collect();
        Domain { lead, width, ins, outs }
    }

    /// Rows of one element: makes the last leading axis the row, so that vectors run along it.
    fn turn(&mut self, nodes: &mut [Node], stores: &[StoreTo]) {
        let bound = |n: &Node| n.uses > 0 && (n.op.is_reduction() || n.op == Op::IotaColumn);
        if self.width != 1 || self.lead.is_empty() || stores.iter().any(|s| s.sum) || nodes.iter().any(bound)
        {
            return;
        }
        let n = self.lead.pop().unwrap_or(1);
        self.width = n;
        for place in self.ins.iter_mut().chain(&mut self.outs) {
            place.step = place.lead.pop().unwrap_or(0);
            place.wide = place.step != 0 && n != 1;
        }
        // Every output has an element for each column now.
        self.outs.iter_mut().for_each(|o| o.wide = true);
        for i in 0..nodes.len() {
            let of_args = nodes[i].args().iter().map(|&a| nodes[a].class).max();
            let input = nodes[i].input;
            let (op, class) = match nodes[i].op {
                Op::Load { dtype, .. } => {
                    let place = &self.ins[input];
                    let class = match (place.wide, place.lead.iter().all(|&s| s == 0)) {
                        (true, _) => Class::Wide,
                        (false, false) => Class::Narrow,
                        (false, true) => Class::Uniform,
                    };
                    (Op::Load { dtype, step: place.step }, class)
                }
                Op::IotaRow { div: 1, .. } => (Op::IotaColumn, Class::Wide),
                Op::IotaRow { div, n: of } => (Op::IotaRow { div: div / n.max(1), n: of }, Class::Narrow),
                op => (op, of_args.unwrap_or(nodes[i].class)),
            };
            (nodes[i].op, nodes[i].class) = (op, class);
        }
    }

    /// Merges neighbouring axes that all operands step over alike.
    fn merge(&mut self, nodes: &[Node], stores: &[StoreTo]) {
        let mut places: Vec<&mut Place> = self.ins.iter_mut().chain(&mut self.outs).collect();
        for a in (0..self.lead.len()).rev() {
            if self.lead[a] == 1 {
                self.lead.remove(a);
                for p in &mut places {
                    p.lead.remove(a);
                }
            }
        }
        for a in (1..self.lead.len()).rev() {
            let n = self.lead[a];
            if places.iter().all(|p| p.lead[a - 1] == p.lead[a] * n) {
                self.lead[a - 1] *= n;
                self.lead.remove(a);
                places.iter_mut().for_each(|p| {
                    let s = p.lead.remove(a);
                    p.lead[a - 1] = s;
                });
            }
        }
        // The row itself, for programs that do not tell rows apart.
        let bound = |n: &Node| {
            n.uses > 0 && (n.class == Class::Narrow || n.op.is_reduction() || n.op == Op::IotaColumn)
        };
        let stored = |o: usize| stores.iter().any(|s| s.output == o);
        if stores.iter().any(|s| s.sum) || nodes.iter().any(bound) {
            return;
        }
        let n_ins = self.ins.len();
        while let Some(&n) = self.lead.last() {
            let width = self.width;
            let uniform = |p: &Place| p.lead.iter().all(|&s| s == 0) && !p.wide;
            let joins = |p: &Place| p.wide && p.lead.last() == Some(&(p.step * width));
            let all = self.ins.iter().all(|p| uniform(p) || joins(p))
                && self.outs.iter().enumerate().all(|(o, p)| !stored(o) || joins(p));
            if !all {
                break;
            }
            self.width *= n;
            self.lead.pop();
            for p in self.ins.iter_mut().chain(&mut self.outs) {
                p.lead.pop();
            }
        }
        debug_assert_eq!(n_ins, self.ins.len());
    }
}

struct Build {
    nodes: Vec<Node>,
    stores: Vec<StoreTo>,
    domain: Domain,
}

/// A step of one instruction list before registers are given out.
#[derive(Clone, Copy)]
enum Item {
    Node(usize),
    Store(usize),
}

impl Build {
    fn live(&self, i: usize) -> bool {
        self.nodes[i].uses > 0
    }

    /// Whether a place is read or written where it lies.
    fn direct(place: &Place) -> bool {
        place.wide && place.dtype == DType::F32 && place.step == 1
    }

    fn finish(&self) -> Tiled {
        let width = self.domain.width;
        let count = |class| {
            (0..self.nodes.len()).filter(move |&i: &usize| self.live(i) && self.nodes[i].class == class)
        };
        let mut slots = vec![u16::MAX; self.nodes.len()];
        let mut uniforms = Vec::new();
        for i in count(Class::Uniform) {
            slots[i] = uniforms.len() as u16;
            uniforms.push(if let Op::Const(x) = self.nodes[i].op { x } else { 0.0 });
        }
        let mut narrows = 0;
        for i in count(Class::Narrow) {
            slots[i] = (uniforms.len() + narrows) as u16;
            narrows += 1;
        }
        let mut sums: Vec<ColumnSum> = Vec::new();
        for s in self.stores.iter().filter(|s| s.sum) {
            let at = sums.last().map_or(0, |l| l.at + if l.wide { width.next_multiple_of(16) } else { 16 });
            sums.push(ColumnSum { output: s.output, at, wide: self.nodes[s.node].class == Class::Wide });
        }
        let mut tiled = Tiled {
            lead: self.domain.lead.clone(),
            width,
            ni: 1,
            no: 1,
            piece: width,
            pitch: width.next_multiple_of(16),
            uniforms,
            narrows,
            ins: self.domain.ins.clone(),
            outs: self.domain.outs.clone(),
            sums,
            fast: Stream {
                uniform: Vec::new(),
                phases: Vec::new(),
                end: Vec::new(),
                wide: 0,
                hazards: Vec::new(),
            },
            safe: None,
        };
        // How many registers decides the tile, and the tile which vectors lie end to end.
        let whole = self.stream(&tiled, &slots, false, false);
        let direct = tiled.ins.iter().chain(&tiled.outs).filter(|p| Build::direct(p)).count();
        let touched = (whole.wide + direct).max(1);
        let tile = (L1_BYTES / 4 / touched).clamp(MIN_TILE, MAX_TILE) / 16 * 16;
        let reduces = (0..self.nodes.len()).any(|i| self.live(i) && self.nodes[i].op.is_reduction());
        if width > tile && (!reduces || touched * tiled.pitch * 4 > ROW_BYTES) {
            tiled.piece = tile;
        } else {
            let rows = (tile / tiled.pitch.max(16)).clamp(1, MAX_ROWS);
            if let [.., n] = tiled.lead[..] {
                tiled.ni = n.min(rows).max(1);
            }
            if let [.., outer, n] = tiled.lead[..]
                && tiled.ni == n
            {
                tiled.no = outer.min(rows / n).max(1);
            }
        }
        let pieces = tiled.in_pieces();
        tiled.fast = self.stream(&tiled, &slots, pieces, false);
        if !tiled.fast.hazards.is_empty() {
            tiled.safe = Some(Box::new(self.stream(&tiled, &slots, pieces, true)));
        }
        tiled
    }

    /// Whether node `i` is an input that is read where it lies; one that an output may overwrite is not, if `safe`.
    fn load_direct(&self, i: usize, safe: bool) -> bool {
        let node = &self.nodes[i];
        let twin = || (0..self.domain.outs.len()).any(|o| self.twins(o).contains(&node.input));
        matches!(node.op, Op::Load { .. })
            && node.class == Class::Wide
            && Build::direct(&self.domain.ins[node.input])
            && !(safe && twin())
    }

    /// Inputs that may be the same view as output `o`.
    fn twins(&self, o: usize) -> Vec<usize> {
        let out = &self.domain.outs[o];
        let same = |p: &Place| {
            // In rows of one element narrow is as wide as wide.
            let wide = p.wide == out.wide || self.domain.width == 1;
            p.dtype == out.dtype && wide && p.step == out.step && p.lead == out.lead
        };
        (0..self.domain.ins.len()).filter(|&i| same(&self.domain.ins[i])).collect()
    }

    fn stream(&self, tiled: &Tiled, slots: &[u16], pieces: bool, safe: bool) -> Stream {
        let mut slots = slots.to_vec();
        let mut stream =
            Stream { uniform: Vec::new(), phases: Vec::new(), end: Vec::new(), wide: 0, hazards: Vec::new() };
        let is = |i: usize, class| self.live(i) && self.nodes[i].class == class;
        for i in (0..self.nodes.len()).filter(|&i| is(i, Class::Uniform)) {
            if !matches!(self.nodes[i].op, Op::Const(_)) {
                stream.uniform.push(self.ins(tiled, &slots, i, slots[i]));
            }
        }
        if !pieces {
            let all = |i: usize| self.live(i) && self.nodes[i].class != Class::Uniform;
            let stores: Vec<usize> = (0..self.stores.len()).collect();
            let items = self.order(&all, &stores, safe);
            let list = self.allocate(tiled, &mut slots, &items, safe, true, &mut stream);
            stream.phases.push(Phase { piece: list, ..Phase::default() });
            return stream;
        }
        let last = (0..self.nodes.len()).filter(|&i| self.live(i)).map(|i| self.nodes[i].level).max();
        let last = last.unwrap_or(0);
        let wide_store = |s: &StoreTo| {
            self.nodes[s.node].class == Class::Wide || (!s.sum && self.domain.outs[s.output].wide)
        };
        for level in 0..=last {
            let mut phase = Phase::default();
            // Narrow values of this level; reductions of the level before have made theirs.
            for i in (0..self.nodes.len()).filter(|&i| is(i, Class::Narrow)) {
                if self.nodes[i].level == level && !self.nodes[i].op.is_reduction() {
                    phase.narrow.push(self.ins(tiled, &slots, i, slots[i]));
                }
            }
            // Backwards from the reductions of the next level, at last from the stores.
            let mut need = vec![false; self.nodes.len()];
            let mut stores = Vec::new();
            for (i, n) in self.nodes.iter().enumerate() {
                if self.live(i) && n.op.is_reduction() && n.level == level + 1 {
                    need[i] = true;
                    let register = slots[i] as usize - tiled.uniforms.len();
                    phase.reduces.push((register, n.op != Op::RowMax));
                }
            }
            if level == last {
                stores = (0..self.stores.len()).filter(|&s| wide_store(&self.stores[s])).collect();
                stores.iter().for_each(|&s| need[self.stores[s].node] = true);
            }
            for i in (0..self.nodes.len()).rev() {
                if need[i] {
                    for &a in self.nodes[i].args() {
                        need[a] |= self.nodes[a].class == Class::Wide;
                    }
                }
            }
            let wanted =
                |i: usize| need[i] && (self.nodes[i].class == Class::Wide || self.nodes[i].op.is_reduction());
            let items = self.order(&wanted, &stores, safe);
            phase.piece = self.allocate(tiled, &mut slots, &items, safe, level == last, &mut stream);
            stream.phases.push(phase);
        }
        for (s, store) in self.stores.iter().enumerate() {
            if !wide_store(store) {
                stream.end.push(self.store(tiled, &slots, s));
            }
        }
        stream
    }

    /// The wanted nodes in program order, loads just before their first use, stores as early as may be: after the
    /// value, or at the end where an input may be the same view.
    fn order(&self, wanted: &dyn Fn(usize) -> bool, stores: &[usize], safe: bool) -> Vec<Item> {
        // A load that is not read where it lies, once.
        let load = |i: usize, done: &mut [bool], items: &mut Vec<Item>| {
            let node = &self.nodes[i];
            if matches!(node.op, Op::Load { .. }) && node.class != Class::Uniform && !done[i] {
                done[i] = true;
                if !self.load_direct(i, safe) {
                    items.push(Item::Node(i));
                }
            }
        };
        let mut items = Vec::new();
        let mut done: Vec<bool> = (0..self.nodes.len()).map(|i| !wanted(i)).collect();
        let early = |s: usize| {
            let o = self.stores[s].output;
            self.stores[s].sum || self.twins(o).is_empty() || (!safe && self.stores_direct(s))
        };
        let mut stored = vec![false; self.stores.len()];
        for i in 0..self.nodes.len() {
            if matches!(self.nodes[i].op, Op::Load { .. }) || !wanted(i) {
                continue;
            }
            for &a in self.nodes[i].args() {
                load(a, &mut done, &mut items);
            }
            items.push(Item::Node(i));
            for &s in stores.iter().filter(|&&s| self.stores[s].node == i && early(s)) {
                stored[s] = true;
                items.push(Item::Store(s));
            }
        }
        for &s in stores.iter().filter(|&&s| !stored[s]) {
            load(self.stores[s].node, &mut done, &mut items);
        }
        items.extend(stores.iter().filter(|&&s| !stored[s]).map(|&s| Item::Store(s)));
        items
    }

    /// Whether store `s` can be written by the operation that makes its value: the first such store of the value.
    fn stores_direct(&self, s: usize) -> bool {
        let store = &self.stores[s];
        let node = &self.nodes[store.node];
        let can = |s: &StoreTo| !s.sum && Build::direct(&self.domain.outs[s.output]);
        can(store)
            && node.class == Class::Wide
            && !matches!(node.op, Op::Load { .. })
            && !self.stores[..s].iter().any(|t| t.node == store.node && can(t))
    }

    /// Gives out registers along the items and makes the instructions.
    fn allocate(
        &self,
        tiled: &Tiled,
        slots: &mut [u16],
        items: &[Item],
        safe: bool,
        stores: bool,
        stream: &mut Stream,
    ) -> Vec<Ins> {
        let mut last_use = vec![0; self.nodes.len()];
        let reads = |item: Item| match item {
            Item::Node(i) => self.nodes[i].args().to_vec(),
            Item::Store(s) => vec![self.stores[s].node],
        };
        for (at, &item) in items.iter().enumerate() {
            reads(item).into_iter().for_each(|a| last_use[a] = at);
        }
        let mut free: Vec<u16> = Vec::new();
        let mut used = 0;
        let mut register = vec![false; self.nodes.len()]; // holds a wide register now
        let mut written: Vec<(usize, usize)> = Vec::new(); // (output, item)
        for (i, n) in self.nodes.iter().enumerate() {
            if n.class == Class::Wide {
                let direct = self.load_direct(i, safe);
                slots[i] = if direct { tiled.in_slot(n.input) as u16 } else { u16::MAX };
            }
        }
        let mut list = Vec::new();
        for (at, &item) in items.iter().enumerate() {
            // What is read here for the last time gives its register to what is made here: elements are read before
            // they are written.
            for a in reads(item) {
                if register[a] && last_use[a] == at {
                    register[a] = false;
                    free.push(slots[a]);
                }
            }
            match item {
                Item::Node(i) if self.nodes[i].class != Class::Wide => {
                    list.push(self.ins(tiled, slots, i, slots[i]));
                }
                Item::Node(i) => {
                    let direct = |&s: &usize| {
                        self.stores[s].node == i
                            && self.stores_direct(s)
                            && (!safe || self.twins(self.stores[s].output).is_empty())
                    };
                    let dst = match (0..self.stores.len()).find(direct) {
                        Some(s) if stores => {
                            written.push((self.stores[s].output, at));
                            tiled.out_slot(self.stores[s].output) as u16
                        }
                        _ => {
                            register[i] = true;
                            free.pop().unwrap_or_else(|| {
                                used += 1;
                                tiled.wide_slot(used - 1) as u16
                            })
                        }
                    };
                    let ins = self.ins(tiled, slots, i, dst);
                    slots[i] = dst;
                    list.push(ins);
                    if register[i] && last_use[i] <= at {
                        // Only its store reads it, which is direct; or nothing does.
                        register[i] = false;
                        free.push(dst);
                    }
                }
                Item::Store(s) => {
                    let o = self.stores[s].output;
                    let done =
                        !self.stores[s].sum && slots[self.stores[s].node] as usize == tiled.out_slot(o);
                    if !done {
                        written.push((o, at));
                        list.push(self.store(tiled, slots, s));
                    }
                }
            }
        }
        stream.wide = stream.wide.max(used);
        // An output must not be an input that is read later.
        for (o, from) in written {
            for input in self.twins(o) {
                let later = items[from + 1..].iter().any(|&item| {
                    let of_input = |i: usize| {
                        matches!(self.nodes[i].op, Op::Load { .. }) && self.nodes[i].input == input
                    };
                    matches!(item, Item::Node(i) if of_input(i)) || reads(item).into_iter().any(of_input)
                });
                if later {
                    stream.hazards.push((o, input));
                }
            }
        }
        list
    }

    fn ins(&self, tiled: &Tiled, slots: &[u16], i: usize, dst: u16) -> Ins {
        let node = &self.nodes[i];
        let wide = node.class == Class::Wide || node.op.is_reduction();
        let mut ins = Ins { op: node.op, narrow: !wide, flat: false, vector: [false; 3], dst, args: [0; 3] };
        let like = if wide { Class::Wide } else { node.class };
        for (k, &a) in node.args().iter().enumerate() {
            ins.args[k] = slots[a];
            ins.vector[k] = self.nodes[a].class == like;
        }
        if let Op::Load { .. } = node.op {
            ins.args[0] = tiled.in_slot(node.input) as u16;
        }
        if let Op::Random { seed, .. } = node.op {
            ins.args[0] = tiled.in_slot(seed) as u16;
        }
        ins.flat = wide
            && !node.op.is_reduction()
            && tiled.tile_rows() > 1
            && !matches!(node.op, Op::Load { .. } | Op::IotaColumn | Op::Random { .. })
            && self.end_to_end(tiled, dst as usize)
            && node.args().iter().zip(ins.args).all(|(&a, slot)| match self.nodes[a].class {
                Class::Wide => self.end_to_end(tiled, slot as usize),
                Class::Narrow => false,
                Class::Uniform => true,
            });
        ins
    }

    /// Whether the rows of a tile lie end to end in a slot.
    fn end_to_end(&self, tiled: &Tiled, slot: usize) -> bool {
        let w = tiled.width;
        if slot >= tiled.wide_slot(0) {
            return tiled.pitch == w;
        }
        let place = match slot {
            s if s >= tiled.out_slot(0) => &tiled.outs[s - tiled.out_slot(0)],
            s => &tiled.ins[s - tiled.in_slot(0)],
        };
        match place.lead[..] {
            [.., outer, inner] => inner == w && (tiled.no == 1 || outer == tiled.ni * w),
            [inner] => inner == w,
            [] => true,
        }
    }

    fn store(&self, tiled: &Tiled, slots: &[u16], s: usize) -> Ins {
        let store = &self.stores[s];
        let wide = self.nodes[store.node].class == Class::Wide;
        let place = &tiled.outs[store.output];
        let (op, dst) = if store.sum {
            let at = self.stores[..s].iter().filter(|s| s.sum).count();
            (Op::ColumnSum, tiled.sum_slot(at))
        } else {
            let op = Op::Store { dtype: place.dtype, step: place.step, wide: place.wide };
            (op, tiled.out_slot(store.output))
        };
        Ins {
            op,
            narrow: false,
            flat: false,
            vector: [wide, false, false],
            dst: dst as u16,
            args: [slots[store.node], 0, 0],
        }
    }
}
