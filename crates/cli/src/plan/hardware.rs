//! Which accelerators an answer is about.

use crate::probe;
use anyhow::{Context, bail};
use sparsam_plan::hardware::{Accelerator, Catalogue};
use std::path::Path;

/// The machines to reckon with.
#[derive(clap::Args)]
#[command(next_help_heading = "Hardware")]
pub struct Hardware {
    /// Accelerators by name, `here` for this machine as a probe of a few seconds finds it, or TOML tables of your own,
    /// which win over the built-in one; separated by commas
    #[arg(long, value_name = "NAME|FILE", value_delimiter = ',')]
    hardware: Vec<String>,
    /// Rent of one accelerator for an hour, in place of the table's
    #[arg(long, value_name = "USD", value_parser = super::usd, allow_hyphen_values = true)]
    usd_per_hour: Option<f64>,
    /// Share of the peak that training reaches, in place of the table's
    #[arg(long, value_name = "SHARE", value_parser = super::share, allow_hyphen_values = true)]
    utilisation: Option<f64>,
    /// Joules that the building draws for each that the boards take
    #[arg(long, value_name = "FACTOR", default_value = "1.2", value_parser = super::count_of, allow_hyphen_values = true)]
    pub pue: f64,
}

/// The name of the machine that the command runs on.
pub const HERE: &str = "here";

/// What the flags chose.
pub struct Chosen {
    /// In the order given; all that are known if none was named.
    pub list: Vec<Accelerator>,
    /// Whether any was named.
    pub named: bool,
}

impl Hardware {
    /// The accelerators that the flags name, or `defaults` (all of the table if empty).
    ///
    /// # Errors
    /// Unknown names, with the nearest known one; files that are no such table.
    pub fn chosen(&self, defaults: &[&str]) -> anyhow::Result<Chosen> {
        let mut all = Catalogue::embedded();
        let mut names = Vec::new();
        for name in &self.hardware {
            let path = Path::new(name);
            if name == HERE {
                all.accelerators.push(probe::measure(0)?.accelerator());
                names.push(name.clone());
            } else if name.ends_with(".toml") || path.is_file() {
                let table = super::read(path)?;
                let own =
                    Catalogue { accelerators: Vec::new() }.with(&table).with_context(|| name.clone())?;
                all = all.with(&table).with_context(|| name.clone())?;
                names.extend(own.accelerators.into_iter().map(|a| a.name));
            } else {
                names.push(name.clone());
            }
        }
        let named = !names.is_empty();
        let mut list = match (named, defaults) {
            (true, _) => names.iter().map(|n| all.get(n).cloned()).collect::<Result<Vec<_>, _>>()?,
            (false, []) => all.accelerators.clone(),
            (false, defaults) => {
                defaults.iter().map(|n| all.get(n).cloned()).collect::<Result<Vec<_>, _>>()?
            }
        };
        if (self.usd_per_hour.is_some() || self.utilisation.is_some()) && list.len() != 1 {
            bail!(
                "--usd-per-hour and --utilisation speak of one accelerator, but {} are chosen; name one with --hardware",
                list.len()
            );
        }
        for a in &mut list {
            a.usd_per_hour = self.usd_per_hour.unwrap_or(a.usd_per_hour);
            a.utilisation = self.utilisation.unwrap_or(a.utilisation);
        }
        Ok(Chosen { list, named })
    }
}

impl Chosen {
    /// The one accelerator that money or hours are turned into arithmetic with.
    ///
    /// # Errors
    /// If none or several were named.
    pub fn single(&self, flag: &str) -> anyhow::Result<&Accelerator> {
        match (&self.list[..], self.named) {
            ([one], true) => Ok(one),
            (list, named) => {
                let known: Vec<&str> = list.iter().map(|a| a.name.as_str()).collect();
                let why =
                    if named { "which of these is meant" } else { "what it buys depends on the machine" };
                bail!("{flag}: {why}; name one with --hardware ({})", known.join(", "))
            }
        }
    }
}
