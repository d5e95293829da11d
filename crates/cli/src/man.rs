//! `sparsam man`: manual pages, from the same descriptions as the help.

use crate::{Cli, plan, text};
use anyhow::{Context, bail};
use clap::{Command, CommandFactory};
use clap_mangen::Man;
use std::path::{Path, PathBuf};

/// Print the manual page of a command, or write all of them to a folder
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sparsam man | man -l -
  sparsam man plan train | man -l -
  sparsam man --out ~/.local/share/man/man1")]
pub struct Args {
    /// The command; sparsam itself if left out
    command: Vec<String>,
    /// Write the pages of all commands to this folder
    #[arg(long, value_name = "FOLDER", conflicts_with = "command")]
    out: Option<PathBuf>,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let mut root = Cli::command();
    root.build();
    if let Some(folder) = &args.out {
        std::fs::create_dir_all(folder).with_context(|| format!("{}: cannot be made", folder.display()))?;
        let n = write_all(&root, folder)?;
        return text::say(format!("{n} pages in {}", folder.display()));
    }
    let mut command = &root;
    for word in &args.command {
        let names: Vec<&str> = command.get_subcommands().map(Command::get_name).collect();
        command = match command.find_subcommand(word) {
            Some(found) => found,
            None => {
                let hint = sparsam_plan::nearest(word, names.iter().copied())
                    .map(|n| format!(" (did you mean `{n}`?)"))
                    .unwrap_or_default();
                bail!("no command `{word}`{hint}; known: {}", names.join(", "))
            }
        };
    }
    text::say(page(command)?.trim_end())
}

/// A command's page in roff.
fn page(command: &Command) -> anyhow::Result<String> {
    let mut page = Vec::new();
    Man::new(command.clone()).title(name(command)).render(&mut page)?;
    Ok(String::from_utf8(page)?)
}

/// `sparsam-plan-train`: spaces would part the words of the title line.
fn name(command: &Command) -> String {
    command.get_bin_name().unwrap_or(command.get_name()).replace(' ', "-")
}

/// Writes the pages of `command` and all below it: how many.
fn write_all(command: &Command, folder: &Path) -> anyhow::Result<usize> {
    plan::write(&folder.join(format!("{}.1", name(command))), &page(command)?)?;
    let mut n = 1;
    for below in command.get_subcommands().filter(|c| c.get_name() != "help") {
        n += write_all(below, folder)?;
    }
    Ok(n)
}
