//! The published figures of sizes, bills and memory that the planner must reproduce, each with its source.

use sparsam_plan::hardware::Catalogue;
use sparsam_plan::law::{Advice, Allocation};
use sparsam_plan::memory::{self, Memory, Optimiser, Precision, Rounding, Step, Use};
use sparsam_plan::serving::{Query, Service};
use sparsam_plan::shape::{self, Shape};

#[track_caller]
fn near(got: f64, want: f64, tolerance: f64) {
    assert!((got / want - 1.0).abs() <= tolerance, "{got:.6e} is not within {tolerance} of {want:.6e}");
}

const CHINCHILLA_FLOP: f64 = 5.76e23;

#[test]
fn gopher_and_chinchilla_budgets() {
    // Hoffmann et al. 2022, section 4.1: Gopher's budget, spent on 1.4 trillion tokens of 70 billion parameters.
    let chinchilla = shape::by_name("chinchilla").unwrap();
    near(chinchilla.parameters().total(), 70e9, 0.01);
    near(1.4e12 * chinchilla.train_flop(2048.0), CHINCHILLA_FLOP, 0.05);
    // Rae et al. 2021, table 1: 280 billion parameters, 300 billion tokens. 6ND is an eighth below the budget.
    let gopher = shape::by_name("gopher").unwrap().parameters().total();
    near(gopher, 280e9, 0.01);
    near(Allocation { parameters: gopher, tokens: 300e9 }.flop(), 0.875 * CHINCHILLA_FLOP, 0.01);
    let best = Advice::Approach1.optimum(CHINCHILLA_FLOP);
    near(best.parameters, 67e9, 0.03);
    near(best.tokens, 1.5e12, 0.06);
}

#[test]
fn gpt_3_counted_exactly() {
    // Brown et al. 2020, table D.1: 174.6 billion parameters, 300 billion tokens, 3.14e23 FLOP.
    let gpt3 = shape::by_name("gpt-3").unwrap();
    near(gpt3.parameters().total(), 174.6e9, 0.001);
    let allocation = Allocation { parameters: gpt3.parameters().total(), tokens: 300e9 };
    near(allocation.flop(), 3.14e23, 0.002);
    // What 6ND forgets is attention: 3 * 4 * layers * width * 1024.5 keys, 1.4% more.
    let parameters = gpt3.parameters();
    let products = parameters.matrices + 50257.0 * 12288.0;
    near(gpt3.train_flop(2048.0), 6.0 * products + 12.0 * 96.0 * 12288.0 * 1024.5, 1e-12);
    near(gpt3.train_flop(2048.0) / 6.0 / parameters.total(), 1.014, 0.001);
}

#[test]
fn gpt_3_costs_four_point_six_million() {
    // The common estimate (2020-06): V100 at 28 TFLOP/s and $1.50 an hour: 355 years of one card, $4.6 million.
    let hardware = Catalogue::embedded();
    let bill = hardware.get("v100").unwrap().bill(3.14e23, 1000.0, 1.2);
    near(bill.usd, 4.6e6, 0.02);
    near(bill.device_hours / 8766.0, 355.0, 0.01);
    near(bill.seconds * 1000.0, bill.device_hours * 3600.0, 1e-12);
    // Money to FLOP and back.
    near(hardware.get("v100").unwrap().flop_for_usd(bill.usd), 3.14e23, 1e-9);
}

#[test]
fn parameters_of_published_checkpoints() {
    // Exact counts of the released checkpoints.
    let check = |name: &str, parameters: f64| {
        assert_eq!(shape::by_name(name).unwrap().parameters().total(), parameters, "{name}");
    };
    check("gpt-2", 124_439_808.0);
    check("llama-7b", 6_738_415_616.0);
    check("llama-65b", 65_285_660_672.0);
    check("llama-3-8b", 8_030_261_248.0);
    check("llama-3-70b", 70_553_706_496.0);
    check("smollm2-135m", 134_515_008.0);
    near(shape::by_name("palm-540b").unwrap().parameters().total(), 540.35e9, 1e-3);
    near(shape::by_name("llama-3-405b").unwrap().parameters().total(), 405.85e9, 1e-3);
}

#[test]
fn gpt_3_needs_five_accelerators_in_16_bits_and_one_in_3() {
    // Frantar et al. 2023 (GPTQ), section 4 and table 6: 5 to 1 A100 with 80 GB, 2048 tokens of context.
    let shape = shape::by_name("gpt-3").unwrap();
    let parameters = shape.parameters();
    let how = Use { context: 2048.0, batch: 1.0, cache_element_bytes: 2.0 };
    let devices = |rounding: Rounding| {
        memory::inference(&shape, rounding.weight_bytes(&parameters), &how).devices(80e9).unwrap()
    };
    assert_eq!(devices(Rounding::BF16), 5);
    assert_eq!(devices(Rounding::GPTQ_3), 1);
    assert_eq!(devices(Rounding::GPTQ_4), 2);
    // Table 6's text: about 63 GB (GiB) of weights in 3 bits, about 9 GB of cache.
    near(Rounding::GPTQ_3.weight_bytes(&parameters) / 1024f64.powi(3), 63.0, 0.03);
    near(memory::inference(&shape, 0.0, &how).cache / 1024f64.powi(3), 9.0, 0.01);
}

#[test]
fn llama_65b_fine_tuned_whole_and_with_qlora() {
    // Dettmers et al. 2023, abstract: more than 780 GB against less than 48 GB.
    let shape = shape::by_name("llama-65b").unwrap();
    let parameters = shape.parameters();
    let step = Step { tokens: 512.0, recompute: true };
    let whole = memory::training(&shape, &parameters, Optimiser::AdamW, Precision::Bf16, &step);
    let states = whole.weights + whole.gradients + whole.optimiser;
    assert!(states > 780e9 && whole.total() < 800e9, "{whole:?}");
    for rank in [16.0, 64.0] {
        let qlora = memory::adapters(&shape, Rounding::NF4.weight_bytes(&parameters), rank, &step);
        assert!(qlora.total() < 48e9 && qlora.total() > 33e9, "rank {rank}: {:e}", qlora.total());
        assert_eq!(qlora.devices(48e9), Some(1));
    }
    // Section 3: double quantisation brings the constants from 0.5 to 0.127 bits, about 3 GB at 65B.
    let saved = (0.5 - 0.127) / 8.0 * parameters.matrices;
    near(saved, 3e9, 0.02);
}

#[test]
fn teacher_and_student_of_distilling_step_by_step() {
    // Hsieh et al. 2023, abstract: 770 million parameters in place of 540 billion, over 700 times smaller.
    let (teacher, student) = (shape::by_name("palm-540b").unwrap(), Shape::for_parameters(770e6).unwrap());
    let ratio = teacher.parameters().total() / student.parameters().total();
    near(ratio, 700.0, 0.02);
    let hardware = Catalogue::embedded();
    let query = Query { prompt: 200.0, answer: 100.0 };
    let cost = |shape: &Shape, batch: f64| {
        let weight_bytes = Rounding::BF16.weight_bytes(&shape.parameters());
        let accelerator = hardware.get("h100").unwrap();
        Service { shape, weight_bytes, cache_element_bytes: 2.0, accelerator }
            .cost(&query, batch, 1.2)
            .unwrap()
    };
    // One sequence at a time, reading the weights is the cost, and it is that of the sizes.
    let alone = cost(&teacher, 1.0).usd_per_query / cost(&student, 1.0).usd_per_query;
    near(alone, ratio, 0.05);
    // In batches of 64 the student's cache weighs more than its weights: still hundreds of times.
    let together = cost(&teacher, 64.0).usd_per_query / cost(&student, 64.0).usd_per_query;
    assert!((300.0..700.0).contains(&together), "{together}");
}

#[test]
fn shapes_by_the_rule_have_the_size_asked_for() {
    for parameters in [3e4, 1e5, 1e6, 1e7, 4.9e7, 1.25e8, 1e9, 7e9, 65e9, 175e9, 1e12] {
        let shape = Shape::for_parameters(parameters).unwrap();
        near(shape.parameters().total(), parameters, if parameters < 1e5 { 0.2 } else { 0.05 });
        assert_eq!(shape.n_heads * shape.head_dim, shape.hidden_size, "{shape:?}");
        assert_eq!(shape.n_heads % shape.n_kv_heads, 0);
    }
    let seven = Shape::for_parameters(6.74e9).unwrap();
    assert!((3072..=5120).contains(&seven.hidden_size), "{seven:?}");
    assert!(Shape::for_parameters(1e3).is_err() && Shape::for_parameters(1e20).is_err());
}

#[test]
fn memory_that_no_number_of_devices_holds() {
    let memory = Memory { weights: 1e9, activations: 10e9, ..Memory::default() };
    assert_eq!(memory.devices(8e9), None);
    assert_eq!(memory.devices(11e9), Some(1));
    assert_eq!(Memory { weights: 100e9, ..memory }.devices(20e9), Some(10));
}

#[test]
fn year_of_traffic_rents_whole_machines() {
    let shape = shape::by_name("llama-3-8b").unwrap();
    let hardware = Catalogue::embedded();
    let accelerator = hardware.get("h100").unwrap();
    let weight_bytes = Rounding::BF16.weight_bytes(&shape.parameters());
    let service = Service { shape: &shape, weight_bytes, cache_element_bytes: 2.0, accelerator };
    let query = Query { prompt: 500.0, answer: 300.0 };
    let cost = service.cost(&query, 32.0, 1.2).unwrap();
    let quiet = service.year(&cost, 10.0, 0.6, 1.2);
    assert_eq!(quiet.copies, 1);
    near(quiet.usd, accelerator.usd_per_hour * 8766.0, 1e-9);
    let busy = service.year(&cost, 50e6, 0.6, 1.2);
    assert!(busy.busy <= 0.6 && busy.busy > 0.55 && busy.copies > 1);
    // Full machines: the dollars a query are those of the roofline over the share of time used.
    near(busy.usd_per_thousand / 1e3, cost.usd_per_query / busy.busy, 1e-6);
}

#[test]
fn a_sweep_spends_its_budget_around_the_optimum() {
    use sparsam_plan::law::Law;
    use sparsam_plan::sweep::{Budget, plan};
    let budget = Budget { flop: 2e15, n_profiles: 3, n_sizes: 5, factor: 3.0, text: None };
    let runs = plan(&Law::BESIROGLU, &budget).unwrap();
    assert_eq!(runs.len(), 15);
    near(runs.iter().map(|r| r.flop).sum(), 2e15, 1e-9);
    for run in &runs {
        near(Allocation { parameters: run.parameters, tokens: run.tokens }.flop(), run.flop, 1e-3);
    }
    for profile in runs.chunks(5) {
        let best = Law::BESIROGLU.optimum(profile[0].flop).parameters;
        assert!(
            profile[0].parameters < 0.6 * best && profile[4].parameters > 1.7 * best,
            "{best:e} {profile:?}"
        );
        assert!(profile.windows(2).all(|w| w[0].parameters < w[1].parameters));
    }
    // With little text, nothing sees it more than four times (shapes are rounded, so a little over is allowed).
    let short = Budget { flop: 1e13, text: Some((1.1e6, 4.0)), ..budget };
    let too_much = plan(&Law::BESIROGLU, &Budget { text: Some((1.1e6, 4.0)), ..budget }).unwrap_err();
    assert!(too_much.to_string().contains("no law holds"), "{too_much}");
    for run in plan(&Law::BESIROGLU, &short).unwrap() {
        assert!(run.tokens <= 1.2 * 4.4e6, "{run:?}");
    }
    assert!(plan(&Law::BESIROGLU, &Budget { n_sizes: 2, ..budget }).is_err());
    assert!(plan(&Law::BESIROGLU, &Budget { flop: 1e5, ..budget }).is_err());
}
