//! The example of the documentation runs and shows what it says.

#[path = "../examples/own_model.rs"]
#[allow(dead_code)] // its main
mod own_model;

#[test]
fn one_line_more_gives_the_same_training() {
    let [plain, fast] = own_model::run(60, 1).unwrap();
    let (first, last) = (plain.losses[0], plain.losses[59]);
    assert!((first - 0.7).abs() < 0.5 && last < 0.5 * first, "{first} {last}");
    for (step, (a, b)) in plain.losses.iter().zip(&fast.losses).enumerate() {
        // Sums in another order: 1e-7 a step at first, grown by training.
        assert!((a - b).abs() < 1e-3, "step {step}: {a} and {b}");
    }
    assert!(plain.seconds > 0.0 && fast.seconds > 0.0);
}
