//! `sparsam completions`: what a shell needs to complete commands and flags.

use crate::{Cli, text};
use clap::CommandFactory;
use clap_complete::Shell;

/// Print completions for a shell: bash, zsh, fish, elvish, powershell
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sparsam completions bash > ~/.local/share/bash-completion/completions/sparsam
  sparsam completions zsh > ~/.zfunc/_sparsam
  sparsam completions fish > ~/.config/fish/completions/sparsam.fish")]
pub struct Args {
    /// The shell
    shell: Shell,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    // Into memory first: the generator panics where its writer fails, and a reader may go away.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "sparsam", &mut script);
    text::say(String::from_utf8(script)?.trim_end())
}
