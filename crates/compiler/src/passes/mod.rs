//! The pipeline: one list of named passes, read from top to bottom.

mod accumulate;
mod collapse;
mod cse;
mod dce;
mod fuse;
mod hoist;
mod in_place;
mod merge;
mod overlap;
mod plan;
mod precision;
mod recompute;
mod rewrite;
mod schedule;
mod simplify;
#[cfg(test)]
pub(crate) mod testing;
mod thin;

use crate::program::Program;
use crate::report::{PassReport, Report, Sums};
use crate::{Error, check, lower};
use sparsam_ir::{Graph, Precision, verify};

/// A pass, by name; each can be switched off alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Pass {
    /// Algebra with constants, views of views, broadcasts moved past arithmetic. Graph to graph.
    Simplify,
    /// Equal nodes become one. Graph to graph.
    Cse,
    /// Nodes that no result needs go. Graph to graph.
    Dce,
    /// Products that are only added to something add in place.
    Accumulate,
    /// Row programs take in row programs.
    Fuse,
    /// What is kept for later shrinks to what the rest can be computed from again.
    Thin,
    /// Products of one activation with several weights become one kernel.
    Merge,
    /// Sums over processes begin as soon as what they sum is there.
    Overlap,
    /// Steps move to where they are needed.
    Schedule,
    /// Updates of states move up to where their values are made.
    Hoist,
    /// Axes that need no counting of their own are merged; pure moves become copies.
    Collapse,
    /// Results take the place of operands that end with them.
    InPlace,
}

impl Pass {
    /// In the order in which they run.
    pub const ALL: [Pass; 12] = [
        Pass::Simplify,
        Pass::Cse,
        Pass::Dce,
        Pass::Accumulate,
        Pass::Fuse,
        Pass::Thin,
        Pass::Merge,
        Pass::Overlap,
        Pass::Schedule,
        Pass::Hoist,
        Pass::Collapse,
        Pass::InPlace,
    ];

    /// The name that options and reports use.
    pub const fn name(self) -> &'static str {
        match self {
            Pass::Simplify => "simplify",
            Pass::Cse => "cse",
            Pass::Dce => "dce",
            Pass::Accumulate => "accumulate",
            Pass::Fuse => "fuse",
            Pass::Thin => "thin",
            Pass::Merge => "merge",
            Pass::Overlap => "overlap",
            Pass::Schedule => "schedule",
            Pass::Hoist => "hoist",
            Pass::Collapse => "collapse",
            Pass::InPlace => "in_place",
        }
    }

    /// The pass with this name.
    pub fn from_name(name: &str) -> Option<Pass> {
        Pass::ALL.into_iter().find(|p| p.name() == name)
    }
}

/// How to compile.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Node after node, no passes: the plain meaning and the baseline.
    pub eager: bool,
    /// Passes to leave out.
    pub off: Vec<Pass>,
    /// Rows of a cross-entropy's logits that exist at once; `None`: as many as take 128 MiB.
    pub loss_rows: Option<usize>,
    /// Bytes that all may take together: arena, inputs, states, and weights as they are stored. Where the program
    /// takes more, forward values are computed again in the backward pass until it fits. Not for eager.
    pub memory: Option<usize>,
    /// What all products are computed in, but those in 8 bits; `None`: as they were traced. [`Precision::Bf16`] rounds
    /// operands as they are read and sums in f32; parameters, moments and everything else stay in f32.
    pub precision: Option<Precision>,
}

impl Options {
    /// No passes at all.
    pub fn eager() -> Options {
        Options { eager: true, ..Options::default() }
    }

    /// All passes but one.
    pub fn without(pass: Pass) -> Options {
        Options { off: vec![pass], ..Options::default() }
    }
}

/// The program that computes what `graph` means.
///
/// In debug builds graph and program are checked after each pass, and an error names the pass.
pub fn compile(graph: &Graph, options: &Options) -> Result<Program, Error> {
    verify(graph).map_err(Error::Graph)?;
    let other = options.precision.map(|p| precision::precision(graph, p));
    let graph = other.as_ref().unwrap_or(graph);
    let mut plain = lower::lower(graph, options.loss_rows)?;
    checked("lower", &plain, false)?;
    plan::plan(&mut plain);
    checked("plan", &plain, true)?;
    let mut report = Report {
        kernels_before: plain.steps.len(),
        bytes_before: plain.bytes_moved(),
        arena_before: plain.arena_bytes,
        ..Report::default()
    };
    let mut program = if options.eager { plain } else { optimised(graph, options, &mut report)? };
    report.kernels = program.steps.len();
    report.bytes = program.bytes_moved();
    report.arena = program.arena_bytes;
    report.memory = recompute::memory(&program);
    report.sums = Sums::of(&program);
    program.report = report;
    Ok(program)
}

fn optimised(graph: &Graph, options: &Options, report: &mut Report) -> Result<Program, Error> {
    let on = |pass: Pass| !options.off.contains(&pass);

    type OnGraph = fn(&Graph) -> Graph;
    let on_graph: [(Pass, OnGraph); 5] = [
        (Pass::Dce, dce::dce),
        (Pass::Simplify, simplify::simplify),
        (Pass::Cse, cse::cse),
        (Pass::Simplify, simplify::simplify), // equal operands, now the same node, show more
        (Pass::Dce, dce::dce),
    ];
    let mut graph = std::borrow::Cow::Borrowed(graph);
    for (pass, run) in on_graph.into_iter().filter(|(p, _)| on(*p)) {
        let new = run(&graph);
        if cfg!(debug_assertions) {
            verify(&new).map_err(|e| Error::Pass { pass: pass.name(), what: e.to_string() })?;
        }
        let (before, after) = (graph.nodes.len(), new.nodes.len());
        report.passes.push(PassReport { name: pass.name(), before, after, unit: "nodes", bytes_moved: None });
        graph = std::borrow::Cow::Owned(new);
    }

    let Some(budget) = options.memory else {
        return on_program(&graph, options, options.loss_rows, &mut report.passes);
    };
    let graph_passes = report.passes.len();
    let (mut passes, mut best) = (Vec::new(), usize::MAX);
    let (program, choice) = recompute::fit(&graph, budget, options.loss_rows, |graph, loss_rows| {
        let mut these = Vec::new();
        let program = on_program(graph, options, loss_rows, &mut these)?;
        // What the report shows is the last one that fits.
        let memory = recompute::memory(&program);
        if memory <= budget || memory < best {
            (passes, best) = (these, memory);
        }
        Ok(program)
    })?;
    report.passes.truncate(graph_passes);
    report.passes.append(&mut passes);
    report.recompute = Some(choice);
    Ok(program)
}

/// From the last graph to the planned program.
fn on_program(
    graph: &Graph,
    options: &Options,
    loss_rows: Option<usize>,
    passes: &mut Vec<PassReport>,
) -> Result<Program, Error> {
    let on = |pass: Pass| !options.off.contains(&pass);
    if cfg!(debug_assertions) {
        verify(graph).map_err(|e| Error::Pass { pass: "recompute", what: e.to_string() })?;
    }
    let mut program = lower::lower(graph, loss_rows)?;
    checked("lower", &program, false)?;
    type OnProgram = fn(&mut Program);
    let on_program: [(Pass, OnProgram); 9] = [
        (Pass::Accumulate, accumulate::accumulate),
        (Pass::Fuse, fuse::fuse),
        (Pass::Thin, thin::thin),
        (Pass::Merge, merge::merge),
        (Pass::Overlap, overlap::overlap),
        (Pass::Schedule, schedule::schedule),
        (Pass::Hoist, hoist::hoist),
        (Pass::Collapse, collapse::collapse),
        (Pass::InPlace, in_place::in_place),
    ];
    for (pass, run) in on_program.into_iter().filter(|(p, _)| on(*p)) {
        let before = program.steps.len();
        run(&mut program);
        checked(pass.name(), &program, false)?;
        let (after, bytes_moved) = (program.steps.len(), Some(program.bytes_moved()));
        passes.push(PassReport { name: pass.name(), before, after, unit: "kernels", bytes_moved });
    }
    plan::plan(&mut program);
    checked("plan", &program, true)?;
    Ok(program)
}

fn checked(pass: &'static str, program: &Program, planned: bool) -> Result<(), Error> {
    if !cfg!(debug_assertions) {
        return Ok(());
    }
    check::check(program, planned).map_err(|what| Error::Pass { pass, what })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_have_names_and_broken_graphs_are_refused() {
        assert!(Pass::ALL.into_iter().all(|p| Pass::from_name(p.name()) == Some(p)));
        assert_eq!(Pass::from_name("magic"), None);
        let mut graph = testing::graph(|t| t.input("x", &[2], sparsam_ir::DType::F32).exp());
        graph.nodes[1].shape = vec![3];
        let e = compile(&graph, &Options::default()).unwrap_err().to_string();
        assert!(e.contains("broken before compilation"), "{e}");
    }

    #[test]
    fn a_broken_program_names_the_pass() {
        let graph = testing::graph(|t| t.input("x", &[2], sparsam_ir::DType::F32).exp().neg());
        let mut program = lower::lower(&graph, None).unwrap();
        program.steps.swap(0, 1);
        let e = checked("schedule", &program, false).unwrap_err().to_string();
        assert!(e.contains("pass schedule broke the program: step 0 (row): reads"), "{e}");
    }
}
