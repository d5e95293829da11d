//! Sums over processes beside the program: a thread of their own makes them while later kernels run.
//!
//! What a program sums is cut into buckets when it is loaded: small values share one, large ones take several, in the
//! order of the program and whatever the timing, so that all processes make the same calls. A bucket is copied out of the
//! session's memory once all that is in it has been made, summed by the thread, and copied back before the first kernel
//! that touches it; in between nobody else uses these bytes, for the memory plan keeps a result's place from the step that
//! begins its sum to the last that reads it. The copies cost a pass over the gradients each, and keep both sides sound
//! without sharing a buffer.

use crate::load::{Call, Kind};
use crate::{Error, Group};
use sparsam_compiler::Program;
use sparsam_kernels::Memory;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

/// Numbers in a bucket: 1 MiB takes a 10 Gbit/s network about a millisecond, ten times what starting a sum does.
const BUCKET: usize = 1 << 18;

/// Buckets that are copied out at once, 64 MiB at most. More wait in the session's memory: the thread has enough to do.
const UNDER_WAY: usize = 64;

/// Numbers of one result, or a part of them.
struct Piece {
    slab: usize,
    /// First byte in the slab.
    start: usize,
    len: usize,
}

/// What is summed in one call.
#[derive(Default)]
pub(crate) struct Bucket {
    pieces: Vec<Piece>,
    len: usize,
}

/// Cuts what `calls`, the steps of `program`, sum into buckets; tells each call how many of them have to be done before
/// it, and how many may be sent behind it.
pub(crate) fn plan(program: &Program, calls: &mut [Call]) -> Vec<Bucket> {
    let (mut buckets, mut open) = (Vec::new(), Bucket::default());
    // The bucket that holds the end of each result which nobody has waited for.
    let mut begun: HashMap<usize, usize> = HashMap::new();
    for (step, call) in program.steps.iter().zip(calls.iter_mut()) {
        for o in step.ins.iter().chain(&step.outs) {
            if let Some(bucket) = begun.remove(&o.place) {
                if bucket == buckets.len() {
                    buckets.push(std::mem::take(&mut open));
                }
                call.wait = call.wait.max(bucket + 1);
            }
        }
        if let Kind::AllReduce = call.kind {
            let to = &call.outs[0];
            let (mut start, mut left) = (to.layout.offset * 4, to.layout.numel());
            while left > 0 {
                let len = left.min(BUCKET - open.len);
                open.pieces.push(Piece { slab: to.slab, start, len });
                open.len += len;
                (start, left) = (start + 4 * len, left - len);
                begun.insert(step.outs[0].place, buckets.len());
                if open.len == BUCKET {
                    buckets.push(std::mem::take(&mut open));
                }
            }
        }
        call.ready = buckets.len();
    }
    if open.len > 0 {
        buckets.push(open);
    }
    buckets
}

/// The thread, and how far it is with the buckets of the program that runs.
pub(crate) struct Sums {
    to: Sender<Vec<f32>>,
    from: Receiver<Vec<f32>>,
    sent: usize,
    done: usize,
    /// Buffers for more buckets.
    spare: Vec<Vec<f32>>,
}

impl Sums {
    /// Starts the thread, which ends with this value; a sum that is under way then goes on by itself.
    pub fn new(group: Arc<dyn Group>) -> Sums {
        let (to, todo) = channel::<Vec<f32>>();
        let (summed, from) = channel();
        std::thread::spawn(move || {
            while let Ok(mut values) = todo.recv() {
                group.sum(&mut values);
                if summed.send(values).is_err() {
                    return;
                }
            }
        });
        Sums { to, from, sent: 0, done: 0, spare: Vec::new() }
    }

    /// A run begins. What a failed one has left under way is waited for, since the other processes count it too.
    pub fn begin(&mut self) -> Result<(), Error> {
        while self.done < self.sent {
            let values = self.from.recv().map_err(|_| Error::Sums)?;
            self.spare.push(values);
            self.done += 1;
        }
        (self.sent, self.done) = (0, 0);
        Ok(())
    }

    /// Sends buckets up to `ready`, as many as may be under way, and takes back what is done; waits for nobody.
    pub fn go_on(&mut self, mem: &mut Memory, buckets: &[Bucket], ready: usize) -> Result<(), Error> {
        while self.done < self.sent {
            match self.from.try_recv() {
                Ok(values) => self.take_back(mem, buckets, values)?,
                Err(_) => break, // not yet; a thread that has ended is found when it is waited for
            }
        }
        while self.sent < ready && self.sent - self.done < UNDER_WAY {
            self.send(mem, buckets)?;
        }
        Ok(())
    }

    /// Whether the first `wanted` buckets are back in their places.
    pub fn are_done(&self, wanted: usize) -> bool {
        self.done >= wanted
    }

    /// Waits until the first `wanted` buckets are summed and back in their places.
    pub fn finish(&mut self, mem: &mut Memory, buckets: &[Bucket], wanted: usize) -> Result<(), Error> {
        while self.done < wanted {
            self.go_on(mem, buckets, wanted)?;
            if self.done < wanted {
                let values = self.from.recv().map_err(|_| Error::Sums)?;
                self.take_back(mem, buckets, values)?;
            }
        }
        Ok(())
    }

    fn send(&mut self, mem: &Memory, buckets: &[Bucket]) -> Result<(), Error> {
        let bucket = &buckets[self.sent];
        let mut values = self.spare.pop().unwrap_or_default();
        values.clear();
        values.reserve_exact(bucket.len);
        for p in &bucket.pieces {
            let bytes = &mem.bytes(p.slab)[p.start..p.start + 4 * p.len];
            values.extend_from_slice(bytemuck::cast_slice(bytes));
        }
        self.sent += 1;
        self.to.send(values).map_err(|_| Error::Sums)
    }

    fn take_back(&mut self, mem: &mut Memory, buckets: &[Bucket], values: Vec<f32>) -> Result<(), Error> {
        let mut rest = &values[..];
        for p in &buckets[self.done].pieces {
            let (here, later) = rest.split_at(p.len);
            let to = &mut mem.bytes_mut(p.slab).map_err(Error::Device)?[p.start..p.start + 4 * p.len];
            to.copy_from_slice(bytemuck::cast_slice(here));
            rest = later;
        }
        self.done += 1;
        self.spare.push(values);
        Ok(())
    }
}
