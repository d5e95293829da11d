//! Memory on a device, and runs in it.

use crate::load::{Call, Kind, Step};
use crate::profile::Profile;
use crate::sums::Sums;
use crate::weights::Entry;
use crate::{Alone, Device, Error, Group, Weights};
use sparsam_dtype::{DType, bf16, f16};
use sparsam_kernels::attention::{self, Packed, Paged, Saved};
use sparsam_kernels::weight::{self, Weight};
use sparsam_kernels::{Context, FilePages, Memory, View, matmul, movement};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Values of an input: a slice of its element type, row-major.
#[derive(Clone, Copy, Debug)]
pub enum Data<'a> {
    /// F32.
    F32(&'a [f32]),
    /// I32.
    I32(&'a [i32]),
    /// The bytes of any type.
    Bytes(&'a [u8]),
}

struct State {
    slab: usize,
    shape: Vec<usize>,
    dtype: DType,
}

/// A file, and the names of the states that lie in it.
struct InFile {
    file: FilePages,
    which: fn(&str) -> bool,
}

/// Memory on a device for the programs loaded into it, which share one arena, and the states that live on between
/// their runs. Programs of one session run one after the other; an output lasts until the next run.
pub struct Session {
    pub(crate) id: u64,
    device: Device,
    pub(crate) weights: Arc<Weights>,
    pub(crate) mem: Memory,
    pub(crate) arena: usize,
    pub(crate) inputs: usize,
    states: HashMap<String, State>,
    paged: Option<InFile>,
    /// Slabs of weights that are read as plain numbers.
    plain: HashMap<String, usize>,
    profile: Option<Profile>,
    group: Arc<dyn Group>,
    /// Of several processes.
    sums: Option<Sums>,
}

impl Session {
    /// An empty session over `weights`.
    pub fn new(device: &Device, weights: Arc<Weights>) -> Session {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let mut mem = Memory::new();
        let (arena, inputs) = (mem.add_owned(0), mem.add_owned(0));
        Session {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            device: device.clone(),
            weights,
            mem,
            arena,
            inputs,
            states: HashMap::new(),
            paged: None,
            plain: HashMap::new(),
            profile: None,
            group: Arc::new(Alone),
            sums: None,
        }
    }

    /// From now on its programs run together with those of the other processes of `group`, which run the same ones in the
    /// same order.
    pub fn set_group(&mut self, group: Arc<dyn Group>) {
        self.sums = (group.size() > 1).then(|| Sums::new(group.clone()));
        self.group = group;
    }

    /// The processes that run together; [`Alone`] until [`Session::set_group`] says otherwise.
    pub fn group(&self) -> &Arc<dyn Group> {
        &self.group
    }

    /// Puts the states with these names that programs loaded from now on define into a file in `folder`, `bytes` of
    /// them ([`FilePages::bytes_for`] each); what has no room there lies in memory. The file has no name, and goes with the
    /// session.
    ///
    /// # Errors
    /// If the disk has no room, or there is no such folder.
    pub fn page(&mut self, folder: &Path, bytes: usize, which: fn(&str) -> bool) -> std::io::Result<()> {
        self.paged = Some(InFile { file: FilePages::new(folder, bytes)?, which });
        Ok(())
    }

    /// Bytes of states that lie in a file.
    pub fn paged_bytes(&self) -> usize {
        self.paged.as_ref().map_or(0, |paged| paged.file.used())
    }

    /// The device that it runs on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The parameters that its programs read.
    pub fn weights(&self) -> &Arc<Weights> {
        &self.weights
    }

    /// Bytes of the arena: as many as the largest program loaded so far needs.
    pub fn arena_bytes(&self) -> usize {
        self.mem.bytes(self.arena).len()
    }

    /// Grows arena and inputs to at least these sizes.
    pub(crate) fn reserve(&mut self, arena: usize, inputs: usize) {
        for (slab, bytes) in [(self.arena, arena), (self.inputs, inputs)] {
            if self.mem.bytes(slab).len() < bytes {
                self.mem.reset_owned(slab, bytes);
            }
        }
    }

    /// Makes sure that there is a state `name` of this shape and type, zero if it is new; `scattered`: rows of it are
    /// written when they are needed, as a cache's, so that it takes memory as it fills. Returns its slab.
    pub(crate) fn define_state(
        &mut self,
        name: &str,
        shape: &[usize],
        dtype: DType,
        scattered: bool,
    ) -> Result<usize, Error> {
        if let Some(s) = self.states.get(name) {
            if s.shape == shape && s.dtype == dtype {
                return Ok(s.slab);
            }
            return Err(Error::Leaf {
                kind: "state",
                name: name.to_string(),
                want: shape.to_vec(),
                want_dtype: dtype,
                got: format!("it is {}{:?} since an earlier program", s.dtype, s.shape),
            });
        }
        let bytes = dtype.bytes_for(shape.iter().product()).unwrap_or(0);
        let paged = self.paged.as_mut().filter(|paged| (paged.which)(name));
        let paged = paged.and_then(|paged| paged.file.zeroed(bytes));
        let slab = match paged {
            Some(paged) => self.mem.add_bytes(paged),
            None if scattered => self.mem.add_sparse(bytes),
            None => self.mem.add_owned(bytes),
        };
        self.states.insert(name.to_string(), State { slab, shape: shape.to_vec(), dtype });
        Ok(slab)
    }

    pub(crate) fn plain_weight(&mut self, name: &str, entry: &Entry) -> Result<usize, Error> {
        if let Some(&slab) = self.plain.get(name) {
            return Ok(slab);
        }
        let slab = self.mem.add_shared(entry.plain(name)?);
        self.plain.insert(name.to_string(), slab);
        Ok(slab)
    }

    /// Names, shapes and types of the states, in no order.
    pub fn states(&self) -> impl Iterator<Item = (&str, &[usize], DType)> {
        self.states.iter().map(|(name, s)| (name.as_str(), s.shape.as_slice(), s.dtype))
    }

    fn state(&self, name: &str) -> Result<&State, Error> {
        self.states.get(name).ok_or_else(|| Error::Unknown {
            kind: "state",
            name: name.to_string(),
            known: sorted(self.states.keys()),
        })
    }

    /// The bytes of a state as they are now.
    ///
    /// # Errors
    /// [`Error::Unknown`] if no loaded program has it.
    pub fn state_bytes(&self, name: &str) -> Result<&[u8], Error> {
        Ok(self.mem.bytes(self.state(name)?.slab))
    }

    /// Replaces the bytes of a state.
    ///
    /// # Errors
    /// [`Error::Unknown`] if no loaded program has it, [`Error::Leaf`] if it takes another number of bytes.
    pub fn set_state(&mut self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let (slab, shape, dtype) = {
            let s = self.state(name)?;
            (s.slab, s.shape.clone(), s.dtype)
        };
        let to = self.mem.bytes_mut(slab).map_err(Error::Device)?;
        if to.len() != bytes.len() {
            let got = format!("got {} bytes", bytes.len());
            return Err(Error::Leaf {
                kind: "state",
                name: name.to_string(),
                want: shape,
                want_dtype: dtype,
                got,
            });
        }
        to.copy_from_slice(bytes);
        Ok(())
    }

    /// Bytes that all states take.
    pub fn states_bytes(&self) -> usize {
        self.states.values().map(|s| self.mem.bytes(s.slab).len()).sum()
    }

    /// Starts (or, with `false`, ends) counting time by kind of kernel.
    pub fn set_profiling(&mut self, on: bool) {
        self.profile = on.then(Profile::default);
    }

    /// Times since profiling began; `None` while it is off.
    pub fn profile(&self) -> Option<&Profile> {
        self.profile.as_ref()
    }

    /// Runs `step` on `inputs` by name; its results last until the next run. Sums over the processes of its group run
    /// beside what does not need them.
    ///
    /// If it fails midway, states may be written in part, and other processes wait in vain.
    ///
    /// # Errors
    /// Inputs that are missing, unknown or of another length or type; indices outside of their tables.
    pub fn run<'a>(&'a mut self, step: &'a Step, inputs: &[(&str, Data)]) -> Result<Outputs<'a>, Error> {
        if step.session != self.id {
            return Err(Error::Foreign);
        }
        self.write_inputs(step, inputs)?;
        let device = self.device.clone();
        if let Some(sums) = &mut self.sums {
            sums.begin()?;
        }
        for (i, call) in step.calls.iter().enumerate() {
            self.wait(step, i, call.wait)?;
            let start = self.profile.is_some().then(Instant::now);
            run_call(device.context(), &mut self.mem, call).map_err(|source| Error::Kernel {
                step: i,
                kernel: call.name,
                source,
            })?;
            if let (Some(p), Some(start)) = (&mut self.profile, start) {
                p.add(i, call.name, start.elapsed(), call.bytes);
            }
            if let Some(sums) = &mut self.sums {
                sums.go_on(&mut self.mem, &step.buckets, call.ready)?;
            }
        }
        self.wait(step, step.calls.len(), step.buckets.len())?;
        if let Some(p) = &mut self.profile {
            p.runs += 1;
        }
        Ok(Outputs { mem: &self.mem, views: &step.outputs })
    }

    /// Waits for the first `buckets` sums of `step` before call `i`.
    fn wait(&mut self, step: &Step, i: usize, buckets: usize) -> Result<(), Error> {
        let Some(sums) = self.sums.as_mut().filter(|s| !s.are_done(buckets)) else { return Ok(()) };
        let start = self.profile.is_some().then(Instant::now);
        sums.finish(&mut self.mem, &step.buckets, buckets)?;
        if let (Some(p), Some(start)) = (&mut self.profile, start) {
            p.add(i, "wait for sums", start.elapsed(), 0);
        }
        Ok(())
    }

    fn write_inputs(&mut self, step: &Step, inputs: &[(&str, Data)]) -> Result<(), Error> {
        for (i, (name, _)) in inputs.iter().enumerate() {
            let known = step.inputs.iter().any(|want| want.name == *name);
            if !known || inputs[..i].iter().any(|(n, _)| n == name) {
                let known = sorted(step.inputs.iter().map(|i| &i.name));
                return Err(Error::Unknown { kind: "input", name: name.to_string(), known });
            }
        }
        let slab = self.mem.bytes_mut(self.inputs).map_err(Error::Device)?;
        for want in &step.inputs {
            let leaf = |got: String| Error::Leaf {
                kind: "input",
                name: want.name.clone(),
                want: want.shape.clone(),
                want_dtype: want.dtype,
                got,
            };
            let Some((_, data)) = inputs.iter().find(|(name, _)| *name == want.name) else {
                return Err(leaf("it was not given".into()));
            };
            let (bytes, dtype): (&[u8], DType) = match data {
                Data::F32(x) => (bytemuck::cast_slice(x), DType::F32),
                Data::I32(x) => (bytemuck::cast_slice(x), DType::I32),
                Data::Bytes(x) => (x, want.dtype),
            };
            let need = want.dtype.bytes_for(want.shape.iter().product()).unwrap_or(0);
            if dtype != want.dtype || bytes.len() != need {
                let n = bytes.len() / dtype.block_bytes();
                return Err(leaf(format!("got {n} numbers of type {dtype}")));
            }
            slab[want.offset..want.offset + need].copy_from_slice(bytes);
        }
        Ok(())
    }
}

fn sorted<'a>(names: impl Iterator<Item = &'a String>) -> Vec<String> {
    let mut names: Vec<String> = names.cloned().collect();
    names.sort();
    names
}

/// Calls `f` with references to `items`: on the stack, where there are few as there nearly always are.
fn with_refs<T, R>(items: &[T], f: impl FnOnce(&[&T]) -> R) -> R {
    const FEW: usize = 24;
    match items {
        [] => f(&[]),
        [first, ..] if items.len() <= FEW => {
            let mut refs = [first; FEW];
            refs.iter_mut().zip(items).for_each(|(r, item)| *r = item);
            f(&refs[..items.len()])
        }
        _ => f(&items.iter().collect::<Vec<_>>()),
    }
}

fn run_call(ctx: &Context, mem: &mut Memory, call: &Call) -> Result<(), sparsam_kernels::Error> {
    let (outs, ins) = (&call.outs, &call.ins);
    match &call.kind {
        Kind::Row(bound) => bound.run(ctx, mem),
        Kind::Matmul(precision, write) => {
            matmul::matmul(ctx, mem, &outs[0], &ins[0], &ins[1], *precision, *write)
        }
        Kind::WeightMatmul(weights, precision) => with_refs(outs, |outs| {
            let mut run = |ws: &[&Weight]| weight::matmul(ctx, mem, outs, &ins[0], ws, *precision);
            match &weights[..] {
                [a] => run(&[a]),
                [a, b] => run(&[a, b]),
                [a, b, c] => run(&[a, b, c]),
                many => run(&many.iter().map(|w| &**w).collect::<Vec<_>>()),
            }
        }),
        Kind::WeightMatmulT(w, precision) => weight::matmul_t(ctx, mem, &outs[0], &ins[0], w, *precision),
        Kind::WeightGather(w) => weight::gather(ctx, mem, &outs[0], &ins[0], w),
        Kind::WeightDecode(w) => {
            let start = outs[0].layout.offset * 4;
            let bytes = &mut mem.bytes_mut(outs[0].slab)?[start..start + w.rows() * w.cols() * 4];
            w.decode_rows(0, bytemuck::cast_slice_mut(bytes))
        }
        Kind::Gather => movement::gather(ctx, mem, &outs[0], &ins[0], &ins[1]),
        Kind::ScatterAdd(false) => movement::scatter_add(ctx, mem, &outs[0], &ins[0], &ins[1]),
        Kind::ScatterAdd(true) => movement::scatter_add_to(ctx, mem, &outs[0], &ins[0], &ins[1]),
        Kind::ScatterRows => movement::scatter_rows(ctx, mem, &outs[0], &ins[0], &ins[1]),
        Kind::Copy => movement::copy(ctx, mem, &outs[0], &ins[0]),
        // The result's place holds this process's own numbers until they are summed.
        Kind::AllReduce if outs[0] == ins[0] => Ok(()),
        Kind::AllReduce => movement::copy(ctx, mem, &outs[0], &ins[0]),
        Kind::Attention { scores, out, lse, page_size } => {
            let (out, lse) = (out.map(|o| &outs[o]), lse.map(|o| &outs[o]));
            let [q, k, v] = [&ins[0], &ins[1], &ins[2]];
            match page_size {
                None => attention::packed(ctx, mem, out, lse, Packed { q, k, v, row_start: &ins[3] }, scores),
                Some(page_size) => {
                    let (positions, row_seq, page_table) = (&ins[3], &ins[4], &ins[5]);
                    let paged = Paged { q, k, v, positions, row_seq, page_table, page_size: *page_size };
                    attention::paged(ctx, mem, out, lse, paged, scores)
                }
            }
        }
        Kind::AttentionBackward { scores, grads } => {
            let packed = Packed { q: &ins[0], k: &ins[1], v: &ins[2], row_start: &ins[3] };
            let saved = Saved { out: &ins[4], lse: &ins[5], dout: &ins[6] };
            attention::packed_backward(ctx, mem, grads.map(|g| &outs[g]), packed, saved, scores)
        }
    }
}

/// Results of a run, read where they lie.
pub struct Outputs<'a> {
    mem: &'a Memory,
    views: &'a [(String, View)],
}

impl<'a> Outputs<'a> {
    fn view(&self, name: &str) -> Result<&'a View, Error> {
        self.views.iter().find(|(n, _)| n == name).map(|(_, v)| v).ok_or_else(|| Error::Unknown {
            kind: "output",
            name: name.to_string(),
            known: sorted(self.views.iter().map(|(n, _)| n)),
        })
    }

    /// Shape of an output.
    ///
    /// # Errors
    /// [`Error::Unknown`] if there is none of that name.
    pub fn shape(&self, name: &str) -> Result<&'a [usize], Error> {
        Ok(&self.view(name)?.layout.shape)
    }

    /// Type and bytes of an output.
    ///
    /// # Errors
    /// [`Error::Unknown`] if there is none of that name.
    pub fn bytes(&self, name: &str) -> Result<(DType, &'a [u8]), Error> {
        let v = self.view(name)?;
        let size = v.dtype.block_bytes();
        let start = v.layout.offset * size;
        Ok((v.dtype, &self.mem.bytes(v.slab)[start..start + v.layout.numel() * size]))
    }

    /// The numbers of an F32 output, without a copy.
    ///
    /// # Errors
    /// [`Error::Unknown`] or [`Error::OutputType`].
    pub fn f32(&self, name: &str) -> Result<&'a [f32], Error> {
        match self.bytes(name)? {
            (DType::F32, bytes) => Ok(bytemuck::cast_slice(bytes)),
            (dtype, _) => Err(Error::OutputType { name: name.to_string(), dtype, want: DType::F32 }),
        }
    }

    /// The numbers of an I32 output, without a copy.
    ///
    /// # Errors
    /// [`Error::Unknown`] or [`Error::OutputType`].
    pub fn i32(&self, name: &str) -> Result<&'a [i32], Error> {
        match self.bytes(name)? {
            (DType::I32, bytes) => Ok(bytemuck::cast_slice(bytes)),
            (dtype, _) => Err(Error::OutputType { name: name.to_string(), dtype, want: DType::I32 }),
        }
    }

    /// The numbers of an F32, F16, BF16 or I32 output, copied as f32.
    ///
    /// # Errors
    /// [`Error::Unknown`] or [`Error::OutputType`].
    pub fn to_f32(&self, name: &str) -> Result<Vec<f32>, Error> {
        let (dtype, bytes) = self.bytes(name)?;
        match dtype {
            DType::F32 => Ok(bytemuck::cast_slice(bytes).to_vec()),
            DType::F16 => Ok(bytemuck::cast_slice::<u8, f16>(bytes).iter().map(|x| x.to_f32()).collect()),
            DType::BF16 => Ok(bytemuck::cast_slice::<u8, bf16>(bytes).iter().map(|x| x.to_f32()).collect()),
            DType::I32 => Ok(bytemuck::cast_slice::<u8, i32>(bytes).iter().map(|&x| x as f32).collect()),
            _ => Err(Error::OutputType { name: name.to_string(), dtype, want: DType::F32 }),
        }
    }
}
