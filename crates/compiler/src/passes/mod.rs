//! The pipeline: one list of named passes, read from top to bottom.

mod collapse;
mod cse;
mod dce;
mod fuse;
mod in_place;
mod merge;
mod plan;
mod rewrite;
mod schedule;
mod simplify;
#[cfg(test)]
pub(crate) mod testing;

use crate::program::Program;
use crate::report::{PassReport, Report};
use crate::{Error, check, lower};
use sparsam_ir::{Graph, verify};

/// A pass, by name; each can be switched off alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Pass {
    /// Algebra with constants, views of views, broadcasts moved past arithmetic. Graph to graph.
    Simplify,
    /// Equal nodes become one. Graph to graph.
    Cse,
    /// Nodes that no result needs go. Graph to graph.
    Dce,
    /// Row programs take in row programs.
    Fuse,
    /// Products of one activation with several weights become one kernel.
    Merge,
    /// Steps move to where they are needed.
    Schedule,
    /// Axes that need no counting of their own are merged; pure moves become copies.
    Collapse,
    /// Results take the place of operands that end with them.
    InPlace,
}

impl Pass {
    /// In the order in which they run.
    pub const ALL: [Pass; 8] = [
        Pass::Simplify,
        Pass::Cse,
        Pass::Dce,
        Pass::Fuse,
        Pass::Merge,
        Pass::Schedule,
        Pass::Collapse,
        Pass::InPlace,
    ];

    /// The name that options and reports use.
    pub const fn name(self) -> &'static str {
        match self {
            Pass::Simplify => "simplify",
            Pass::Cse => "cse",
            Pass::Dce => "dce",
            Pass::Fuse => "fuse",
            Pass::Merge => "merge",
            Pass::Schedule => "schedule",
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

    let mut program = lower::lower(&graph, options.loss_rows)?;
    checked("lower", &program, false)?;
    type OnProgram = fn(&mut Program);
    let on_program: [(Pass, OnProgram); 5] = [
        (Pass::Fuse, fuse::fuse),
        (Pass::Merge, merge::merge),
        (Pass::Schedule, schedule::schedule),
        (Pass::Collapse, collapse::collapse),
        (Pass::InPlace, in_place::in_place),
    ];
    for (pass, run) in on_program.into_iter().filter(|(p, _)| on(*p)) {
        let before = program.steps.len();
        run(&mut program);
        checked(pass.name(), &program, false)?;
        let (after, bytes_moved) = (program.steps.len(), Some(program.bytes_moved()));
        report.passes.push(PassReport { name: pass.name(), before, after, unit: "kernels", bytes_moved });
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
