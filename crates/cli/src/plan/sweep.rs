//! `sparsam plan sweep`: which small runs to make, for a law of one's own.

use super::hardware::Hardware;
use super::{Answer, Output};
use anyhow::{Context, bail};
use serde_json::json;
use sparsam_plan::law::Law;
use sparsam_plan::report::{Report, Table};
use sparsam_plan::sweep::{self, Budget, Planned};
use sparsam_plan::units::{show_count, show_flop, show_seconds, show_usd, three};
use std::path::{Path, PathBuf};

/// The small runs that fix a scaling law of your own, for a budget
///
/// IsoFLOP profiles (Hoffmann et al. 2022, section 3.2): several budgets, at each several sizes around the best one.
/// `--out` writes them as a table and as configurations of `sparsam train`; `plan fit` reads the runs' folders.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sparsam plan sweep --flops 2e15
  sparsam plan sweep --flops 1e13 --unique 1.1M --epochs 4 --out runs --hardware here
  sparsam plan sweep --gpu-hours 8 --hardware rtx-4090 --profiles 4")]
pub struct Args {
    /// Arithmetic of all runs together
    #[arg(long, alias = "flop", value_name = "FLOP", value_parser = super::flop, allow_hyphen_values = true, required_unless_present_any = ["usd", "gpu_hours"])]
    flops: Option<f64>,
    /// Money for all runs together, on the one accelerator of --hardware
    #[arg(long, value_name = "USD", value_parser = super::usd, allow_hyphen_values = true, conflicts_with = "flops")]
    usd: Option<f64>,
    /// Hours of the one accelerator of --hardware for all runs together
    #[arg(long, value_name = "HOURS", value_parser = super::count_of, allow_hyphen_values = true, conflicts_with_all = ["flops", "usd"])]
    gpu_hours: Option<f64>,
    /// Budgets, at each several sizes
    #[arg(long, value_name = "N", default_value = "3")]
    profiles: usize,
    /// Sizes at each budget
    #[arg(long, value_name = "N", default_value = "5")]
    sizes: usize,
    /// From each budget to the next
    #[arg(long, value_name = "FACTOR", default_value = "3", value_parser = super::count_of, allow_hyphen_values = true)]
    factor: f64,
    /// Unique tokens that there are
    #[arg(long, value_name = "TOKENS", value_parser = super::tokens, allow_hyphen_values = true)]
    unique: Option<f64>,
    /// How often each token may be seen
    #[arg(long, value_name = "N", default_value = "4", value_parser = super::count_of, allow_hyphen_values = true)]
    epochs: f64,
    /// Folder to write the table of runs to
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    #[command(flatten)]
    hardware: Hardware,
    #[command(flatten)]
    output: Output,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let hardware = args.hardware.chosen(&[])?;
    let flop = match (args.flops, args.usd, args.gpu_hours) {
        (Some(flop), _, _) => flop,
        (_, Some(usd), _) => hardware.single("--usd")?.flop_for_usd(usd),
        (_, _, Some(hours)) => hardware.single("--gpu-hours")?.flop_for_hours(hours),
        (None, None, None) => bail!("give a budget: --flops, --usd or --gpu-hours"),
    };
    let budget = Budget {
        flop,
        n_profiles: args.profiles,
        n_sizes: args.sizes,
        factor: args.factor,
        text: args.unique.map(|u| (u, args.epochs)),
    };
    let planned = sweep::plan(&Law::BESIROGLU, &budget)?;
    let mut report = Report::new(format!("{} runs, {} FLOP together", planned.len(), show_flop(flop)));
    let mut table =
        Table::new("", &["run", "parameters", "tokens", "tokens/param", "FLOP", "shape"]).left(&[5]);
    for p in &planned {
        table.push([
            p.name.clone(),
            show_count(p.parameters),
            show_count(p.tokens),
            three(p.tokens / p.parameters),
            show_flop(p.flop),
            p.shape.describe(),
        ]);
    }
    report.table(table);
    if hardware.named {
        for a in &hardware.list {
            let bill = a.bill(flop, 1.0, args.hardware.pue);
            report.text(format!(
                "On one {}: {}, {}.",
                a.title,
                show_seconds(bill.seconds),
                show_usd(bill.usd)
            ));
        }
    }
    report.text(
        "Sizes lie a factor of 1.73 apart around the best one by Besiroglu et al. 2024; a law of your own text will \
         differ. Fit it with: sparsam plan fit FOLDER.",
    );
    if let Some(folder) = &args.out {
        write(folder, &planned)?;
        report.text(format!(
            "Written: {} and a configuration for each run. Make them, one after the other, with: for c in {}/*.toml; do \
             sparsam train --config $c --data TEXT --out ${{c%.toml}}; done",
            folder.join(TABLE).display(),
            folder.display()
        ));
    }
    let json = json!({"flop": flop, "runs": planned});
    args.output.give(&Answer { report, json })
}

const TABLE: &str = "sweep.csv";

/// Writes the runs as a table, and each as a configuration.
fn write(folder: &Path, planned: &[Planned]) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("{}: cannot be made", folder.display()))?;
    for run in planned {
        super::write(&folder.join(format!("{}.toml", run.name)), &sweep::to_config(run))?;
    }
    super::write(&folder.join(TABLE), &sweep::to_csv(planned))
}
