//! Makes `src/besiroglu_draws.csv`: `cargo run -p sparsam-plan --example bootstrap_draws > FILE`.

use sparsam_plan::{draws, fit, runs};

fn main() -> Result<(), sparsam_plan::Error> {
    let all = runs::from_csv(include_str!("../tests/data/chinchilla-runs.csv"))?;
    let (kept, _) = runs::drop_highest(&all, 5);
    println!("ln_a,ln_b,ln_e,alpha,beta");
    for law in fit::fit(&kept, draws::COUNT, draws::SEED)?.draws {
        println!("{:.7},{:.7},{:.7},{:.7},{:.7}", law.a.ln(), law.b.ln(), law.e.ln(), law.alpha, law.beta);
    }
    Ok(())
}
