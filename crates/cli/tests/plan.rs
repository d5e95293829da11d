//! `sparsam plan` from end to end: the published figures that it must reproduce, each with its source.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

fn sparsam(args: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_sparsam");
    Command::new(program).arg("plan").args(args).env("COLUMNS", "110").output().expect("the binary runs")
}

/// The answer of `sparsam plan ARGS --json`.
#[track_caller]
fn json(args: &[&str]) -> Value {
    let out = sparsam(&[args, &["--json"]].concat());
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{args:?}: {e}"))
}

/// What `sparsam plan ARGS` prints.
#[track_caller]
fn text(args: &[&str]) -> String {
    let out = sparsam(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

#[track_caller]
fn near(got: &Value, want: f64, tolerance: f64) {
    let got = got.as_f64().unwrap_or_else(|| panic!("{got} is no number"));
    assert!((got / want - 1.0).abs() <= tolerance, "{got:e} is not within {tolerance} of {want:e}");
}

/// The entry of `list` whose `key` is `name`.
#[track_caller]
fn entry<'a>(list: &'a Value, key: &str, name: &str) -> &'a Value {
    let found = list.as_array().and_then(|l| l.iter().find(|e| e[key] == name));
    found.unwrap_or_else(|| panic!("no {key} {name} in {list}"))
}

const CHINCHILLA: &str = "5.76e23";

#[test]
fn table_3_of_hoffmann_by_approach_1() {
    // Hoffmann et al. 2022, table 3: FLOP, parameters, tokens.
    let rows = [
        ("1.92e19", 400e6, 8.0e9),
        ("1.21e20", 1e9, 20.2e9),
        ("1.23e22", 10e9, 205.1e9),
        // 6 * 67e9 * 1.5e12 is 4.7% more FLOP than the row says: its tokens are rounded.
        ("5.76e23", 67e9, 1.43e12),
        ("3.85e24", 175e9, 3.7e12),
        ("9.90e24", 280e9, 5.9e12),
        ("1.27e26", 1e12, 21.2e12),
    ];
    for (flop, parameters, tokens) in rows {
        let got = json(&["train", "--flops", flop, "--law", "hoffmann-1", "--hardware", "h100"]);
        near(&got["optimum"]["parameters"], parameters, 0.03);
        near(&got["optimum"]["tokens"], tokens, 0.03);
    }
}

#[test]
fn every_fit_says_which_it_is_and_rounding_moves_the_advice_by_half() {
    let got = json(&["train", "--flops", CHINCHILLA]);
    // Worked out from each source's constants at Chinchilla's budget: Besiroglu et al. 2024, section 3.2 (the
    // default); Hoffmann et al. 2022, approach 3, unrounded (from the paper's TeX) and as printed in equation 10.
    for (name, parameters, ratio) in
        [("besiroglu", 72.4e9, 18.3), ("hoffmann-3", 40.4e9, 58.9), ("hoffmann-3-rounded", 32.2e9, 92.7)]
    {
        let line = entry(&got["advice"], "name", name);
        near(&line["parameters"], parameters, 0.005);
        near(&line["tokens_per_parameter"], ratio, 0.005);
    }
    assert_eq!(got["optimum"]["name"], "besiroglu");
    let band = &got["optimum"]["parameters_band"];
    assert!(band[0].as_f64().unwrap() < 69e9 && band[1].as_f64().unwrap() > 73e9, "{band}");
    // The curve is least at the best size.
    let curve = got["curve"].as_array().unwrap();
    let best =
        curve.iter().min_by(|a, b| a["loss"].as_f64().unwrap().total_cmp(&b["loss"].as_f64().unwrap()));
    near(&best.unwrap()["parameters"], 72.4e9, 0.01);
    let shown = text(&["train", "--flops", CHINCHILLA]);
    for part in [
        "72.2B parameters on 1.33T tokens (18.4 a parameter), loss 1.974",
        "Besiroglu et al. 2024",
        "80% band",
        "X best",
    ] {
        assert!(shown.contains(part), "no `{part}` in\n{shown}");
    }
}

#[test]
fn gpt_3_and_its_bill() {
    // Brown et al. 2020, table D.1: 174.6 billion parameters, 300 billion tokens, 3.14e23 FLOP; the common estimate of
    // 2020: V100s at 28 TFLOP/s and $1.50 an hour, 355 years of one, about $4.6 million.
    let got = json(&["train", "--model", "gpt-3", "--tokens", "300B", "--hardware", "v100"]);
    near(&got["flop"], 3.14e23, 0.002);
    let bill = &got["bills"][0]["bill"];
    near(&bill["usd"], 4.6e6, 0.02);
    near(&bill["device_hours"], 355.0 * 8766.0, 0.01);
    // Attention, which 6ND forgets, is 1.4% more (12 * layers * width * 1024.5 keys a token).
    near(&got["exact"]["flop"], 3.14e23 * 1.014, 0.003);
    // The same by its round size.
    let round = json(&["train", "--params", "175B", "--tokens", "300B", "--hardware", "v100"]);
    near(&round["flop"], 3.15e23, 1e-9);
    near(&round["bills"][0]["bill"]["usd"], 4.6e6, 0.03);
    // Money turns into arithmetic and back.
    let usd = bill["usd"].to_string();
    near(&json(&["train", "--usd", &usd, "--hardware", "v100"])["flop"], got["flop"].as_f64().unwrap(), 1e-9);
    let hours = bill["device_hours"].to_string();
    near(
        &json(&["train", "--gpu-hours", &hours, "--hardware", "v100"])["flop"],
        got["flop"].as_f64().unwrap(),
        1e-9,
    );
}

#[test]
fn limited_text_by_muennighoff() {
    // Muennighoff et al. 2023, figure 1 (right); values printed by the authors' own code.
    let at = |params: &str, tokens: &str| {
        json(&["train", "--params", params, "--tokens", tokens, "--unique", "25B", "--hardware", "h100"])
    };
    let small = at("6.34B", "242B");
    near(&small["unique"]["as_planned"]["loss"], 2.225_644_089, 1e-8);
    near(&small["unique"]["as_planned"]["epochs"], 9.68, 1e-9);
    let large = at("8.67B", "178B");
    near(&large["unique"]["as_planned"]["loss"], 2.226_963_407_6, 1e-8);
    // Their grid search from the second one's budget: 6.8 billion parameters, 227 billion tokens.
    near(&large["unique"]["best"]["allocation"]["parameters"], 6.8e9, 0.01);
    near(&large["unique"]["best"]["allocation"]["tokens"], 227e9, 0.01);
    // Villalobos et al. 2024, section 4: about 300 trillion tokens, 100 to 1000.
    assert_eq!(small["stock"]["tokens"], 300e12);
    assert!(text(&["train", "--flops", "1e26", "--unique", "25B"]).contains("Villalobos et al. 2024"));
}

#[test]
fn a_life_of_answers_asks_for_a_smaller_model() {
    // Sardana et al. 2024, section 3: from about a billion requests on, smaller and longer than Chinchilla.
    let got = json(&["train", "--flops", "1e23", "--serve", "2T", "--hardware", "h100"]);
    let (alone, life) = (&got["serve"]["training_only"], &got["serve"]["best"]);
    assert!(life["parameters"].as_f64().unwrap() < 0.7 * alone["parameters"].as_f64().unwrap(), "{got}");
    assert!(life["tokens"].as_f64().unwrap() > 1.3 * alone["tokens"].as_f64().unwrap());
    assert!(
        got["serve"]["best_flop"].as_f64().unwrap() < got["serve"]["training_only_flop"].as_f64().unwrap()
    );
    let out = sparsam(&["train", "--flops", "1e23", "--serve", "2T", "--law", "hoffmann-1"]);
    assert!(String::from_utf8_lossy(&out.stderr).contains("take --law besiroglu"));
}

#[test]
fn gpt_3_needs_five_accelerators_in_16_bits_and_one_in_3() {
    // Frantar et al. 2023 (GPTQ), section 4 and table 6: A100 with 80 GB, 2048 tokens of context.
    let got = json(&["memory", "gpt-3", "--context", "2048", "--hardware", "a100"]);
    let devices = |name: &str| entry(&got["inference"], "name", name)["devices"]["a100"].clone();
    assert_eq!(devices("bf16"), 5);
    assert_eq!(devices("gptq 3 bits, rows"), 1);
    // Their text: about 9 GB (GiB) of cache.
    near(&entry(&got["inference"], "name", "bf16")["bytes"]["cache"], 9.0 * 1024f64.powi(3), 0.01);
}

#[test]
fn llama_65b_fine_tuned_whole_and_with_qlora() {
    // Dettmers et al. 2023 (QLoRA), abstract: more than 780 GB against less than 48 GB.
    let got = json(&["memory", "llama-65b", "--hardware", "l40s,h100"]);
    let full = entry(&got["training"], "detail", "bf16");
    assert!(
        full["total_bytes"].as_f64().unwrap() > 780e9 && full["total_bytes"].as_f64().unwrap() < 800e9,
        "{full}"
    );
    let qlora = entry(&got["training"], "name", "QLoRA rank 16");
    assert!(qlora["total_bytes"].as_f64().unwrap() < 48e9, "{qlora}");
    assert_eq!(qlora["devices"]["l40s"], 1);
    assert_eq!(full["devices"]["h100"], 10);
}

#[test]
fn a_file_is_planned_from_its_real_tensors() {
    let Some(model) = sparsam_testkit::smollm2() else { return };
    let path = model.to_str().unwrap();
    let got = json(&["memory", path, "--context", "2048", "--hardware", "rtx-4090"]);
    // The released checkpoint's count; the file's bytes are its tensors, a few MB of vocabulary and metadata.
    assert_eq!(got["parameters"], 134_515_008.0);
    let file = std::fs::metadata(&model).unwrap().len() as f64;
    let stored = got["stored_bytes"].as_f64().unwrap();
    assert!(stored < file && stored > 0.97 * file, "{stored} of {file}");
    near(&got["bits_per_weight"], 8.0 * stored / 134_515_008.0, 1e-12);
    let first = &got["inference"][0];
    assert_eq!((&first["name"], &first["bytes"]["weights"]), (&"as stored".into(), &got["stored_bytes"]));
    // 30 layers * 2 * 3 heads * 64 * 2 bytes = 23040 bytes a token.
    near(&first["bytes"]["cache"], 23040.0 * 2048.0, 1e-12);
    let served = json(&["serve", path, "--hardware", "l4"]);
    assert_eq!(served["weight_bytes"], got["stored_bytes"]);
}

#[test]
fn teacher_and_student_of_distilling_step_by_step() {
    // Hsieh et al. 2023, abstract: 770 million parameters in place of 540 billion, over 700 times smaller. One
    // sequence at a time, an answer costs the reading of the weights.
    let got = json(&[
        "serve",
        "palm-540b",
        "--against",
        "770M",
        "--batch",
        "1",
        "--hardware",
        "h100",
        "--prompt",
        "200",
        "--answer",
        "100",
        "--queries-per-day",
        "1M",
    ]);
    near(&got["costs"][0]["ratio"], 700.0, 0.06);
    let cost = &got["costs"][0]["cost"];
    // The roofline by hand: weights in 16 bits over the bandwidth of all devices at the table's 0.7.
    let devices = cost["devices"].as_f64().unwrap();
    near(&cost["step_seconds"], 540.35e9 * 2.0 / (devices * 3350e9 * 0.7), 0.01);
    assert_eq!(cost["bound"], "memory");
    let year = &got["costs"][0]["year"];
    near(&year["usd"], year["devices"].as_f64().unwrap() * 2.95 * 8766.0, 1e-9);
    assert!(year["busy"].as_f64().unwrap() <= 0.6);
}

fn chinchilla_runs() -> String {
    sparsam_testkit::root().join("crates/plan/tests/data/chinchilla-runs.csv").display().to_string()
}

#[test]
fn besiroglu_fit_from_the_runs_and_a_plan_by_it() {
    // Besiroglu et al. 2024, section 3.2 and notebook: 240 of the 245 runs read off Hoffmann et al.'s figure 4; the
    // five left out have the highest losses, of models above 2 billion parameters with under half a token a parameter.
    let got = json(&["fit", &chinchilla_runs(), "--drop-highest", "5", "--draws", "300"]);
    let published = [
        ("A", 482.01, 124.58),
        ("B", 2085.43, 1293.23),
        ("E", 1.8172, 0.0257),
        ("alpha", 0.3478, 0.0154),
        ("beta", 0.3658, 0.0206),
    ];
    for (name, value, error) in published {
        let c = entry(&got["constants"], "name", name);
        let off = (c["value"].as_f64().unwrap() - value).abs();
        assert!(off < 0.1 * error, "{c}");
        near(&c["standard_error"], error, 0.25);
    }
    assert_eq!(got["n_runs"], 240);
    for run in got["left_out"].as_array().unwrap() {
        let of = |key: &str| run[key].as_f64().unwrap();
        assert!(of("parameters") > 2e9 && of("tokens") < 0.5 * of("parameters"), "{run}");
    }
    // The fit is a law to plan by: the same advice as that of the built-in constants.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("fit.json");
    std::fs::write(&file, got.to_string()).unwrap();
    let plan = json(&["train", "--flops", CHINCHILLA, "--law", file.to_str().unwrap(), "--hardware", "h100"]);
    near(&plan["optimum"]["parameters"], 72.4e9, 0.02);
    assert!(plan["optimum"]["parameters_band"][0].is_number(), "{plan}");
}

#[test]
fn runs_folders_are_read_and_a_held_back_run_is_predicted() {
    let folder = tempfile::tempdir().unwrap();
    let law = |n: f64, d: f64| 1.2 + 50.0 / n.powf(0.3) + 300.0 / d.powf(0.4);
    for (i, n) in [1e5, 3e5, 1e6, 3e6].into_iter().enumerate() {
        for (j, d) in [1e7, 4e7, 1.6e8].into_iter().enumerate() {
            let run = folder.path().join(format!("run-{i}{j}"));
            std::fs::create_dir(&run).unwrap();
            std::fs::write(run.join("config.toml"), format!("[receipt]\nparameters = {n}\n")).unwrap();
            let metrics = format!(
                "{{\"tokens\":0,\"loss\":9.0}}\n{{\"tokens\":{d},\"held_back_loss\":{}}}\n",
                law(n, d)
            );
            std::fs::write(run.join("metrics.jsonl"), metrics).unwrap();
        }
    }
    std::fs::create_dir(folder.path().join("no-run")).unwrap();
    let path = folder.path().to_str().unwrap();
    let got = json(&["fit", path, "--hold-back", "1", "--draws", "5", "--at", "1e18"]);
    assert_eq!(got["n_runs"], 11);
    near(&got["held_back"][0]["run"]["parameters"], 3e6, 1e-12);
    assert!(got["held_back"][0]["relative_error"].as_f64().unwrap().abs() < 1e-4, "{got}");
    near(&entry(&got["constants"], "name", "alpha")["value"], 0.3, 0.01);
    assert_eq!(got["optima"][0]["flop"], 1e18);
    let out = sparsam(&["fit", folder.path().join("no-run").to_str().unwrap()]);
    assert!(String::from_utf8_lossy(&out.stderr).contains("metrics.jsonl and config.toml"));
}

#[test]
fn a_sweep_spends_its_budget_and_writes_its_runs() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("runs");
    let args = ["sweep", "--flops", "1e13", "--unique", "1.1M", "--out", out.to_str().unwrap()];
    let got = json(&args);
    let runs = got["runs"].as_array().unwrap();
    assert!((9..=15).contains(&runs.len()), "{got}");
    let flop: f64 = runs.iter().map(|r| r["flop"].as_f64().unwrap()).sum();
    // Sizes for which there is too little text are left out.
    assert!(flop <= 1e13 * (1.0 + 1e-9) && flop > 0.6 * 1e13, "{flop:e}");
    assert!(runs.iter().all(|r| r["tokens"].as_f64() >= r["parameters"].as_f64().map(|n| 0.5 * n)), "{got}");
    // Four epochs of 1.1 million tokens; shapes are rounded to whole widths.
    assert!(runs.iter().all(|r| r["tokens"].as_f64().unwrap() <= 1.2 * 4.4e6), "{got}");
    let table = std::fs::read_to_string(out.join("sweep.csv")).unwrap();
    assert!(table.starts_with("name,parameters,tokens,training_flop,n_layers"), "{table}");
    assert_eq!(table.lines().count(), runs.len() + 1);
    // A configuration of `sparsam train` for each.
    let config = std::fs::read_to_string(out.join("c2-s2.toml")).unwrap();
    let planned = entry(&got["runs"], "name", "c2-s2");
    for line in [
        format!("layers = {}", planned["shape"]["n_layers"]),
        format!("hidden = {}", planned["shape"]["hidden_size"]),
        format!("tokens = \"{}\"", planned["tokens"].as_f64().unwrap()),
        "tokenizer = \"bytes\"".to_string(),
    ] {
        assert!(config.contains(&line), "no `{line}` in\n{config}");
    }
}

#[test]
fn pages_and_plots_are_self_contained() {
    let folder = tempfile::tempdir().unwrap();
    let (html, svg) = (folder.path().join("plan.html"), folder.path().join("plan.svg"));
    let (html_arg, svg_arg) = (html.to_str().unwrap(), svg.to_str().unwrap());
    text(&["train", "--flops", "1e22", "--html", html_arg, "--svg", svg_arg]);
    let page = std::fs::read_to_string(&html).unwrap();
    assert!(page.contains("<svg") && page.contains("Besiroglu") && page.contains("</html>"));
    assert!(!page.contains("src=") && !page.contains("href="));
    let plot = std::fs::read_to_string(&svg).unwrap();
    assert!(plot.starts_with("<svg") && plot.trim_end().ends_with("</svg>"), "{plot}");
    // A question without a plot says so, and writes nothing.
    let none = folder.path().join("none.svg");
    let out = sparsam(&["memory", "gpt-2", "--svg", none.to_str().unwrap()]);
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("no plot") && !none.exists());
}

#[test]
fn a_table_of_ones_own_wins() {
    let folder = tempfile::tempdir().unwrap();
    let table = folder.path().join("cards.toml");
    let card = "[[accelerator]]\nname = 'h100'\npeak_tflops = 1000\nmemory = '100GB'\nbandwidth_gbps = 3000\n\
                watts = 500\nusd_per_hour = 1\nutilisation = 0.5\n";
    std::fs::write(&table, card).unwrap();
    let got = json(&["train", "--flops", "1.8e21", "--hardware", table.to_str().unwrap()]);
    assert_eq!(got["bills"].as_array().unwrap().len(), 1);
    // 1.8e21 FLOP at 500 TFLOP/s are 1000 hours: 1000 dollars, and 600 kWh at 1.2 joules for each of the board's.
    near(&got["bills"][0]["bill"]["usd"], 1000.0, 1e-9);
    near(&got["bills"][0]["bill"]["joules"], 600.0 * 3.6e6, 1e-9);
    let dearer = json(&["train", "--flops", "1.8e21", "--hardware", "h100", "--usd-per-hour", "$10"]);
    near(&dearer["bills"][0]["bill"]["usd"], 1.8e21 / (989e12 * 0.4) / 3600.0 * 10.0, 1e-9);
}

#[test]
fn nonsense_gets_a_clear_error() {
    #[track_caller]
    fn check(args: &[&str], code: i32, part: &str) {
        let out = sparsam(args);
        let message = String::from_utf8_lossy(&out.stderr).to_string();
        assert_eq!(out.status.code(), Some(code), "{args:?}: {message}");
        assert!(message.contains(part) && !message.contains("panicked"), "{args:?}: {message}");
        assert!(out.stdout.is_empty(), "{args:?} prints before it fails");
    }
    // Wrong amounts are wrong usage.
    check(&["train", "--flops", "-3e20"], 2, "is negative");
    check(&["train", "--flops", "0"], 2, "is zero");
    check(&["train", "--flops", "1e99"], 2, "too large");
    check(&["train", "--flops", "lots"], 2, "is not a number");
    check(&["memory", "--params", "7X"], 2, "unknown unit `X`");
    check(&["serve", "gpt-2", "--busy", "120%"], 2, "more than the whole");
    check(&["train"], 2, "--flops");
    check(&["train", "--params", "7B"], 2, "--tokens");
    check(&["train", "--flops", "1e20", "--usd", "5"], 2, "cannot be used with");
    // Unknown names come with the nearest known one.
    check(&["train", "--flops", "1e20", "--hardware", "h10"], 1, "did you mean `h100`?");
    check(&["train", "--flops", "1e20", "--law", "besirogl"], 1, "did you mean `besiroglu`?");
    check(&["memory", "lama-65b"], 1, "did you mean `llama-65b`?");
    check(&["serve", "gpt-2", "--weights", "q4_1"], 1, "did you mean `q4_0`?");
    // Questions that lack something.
    check(&["train", "--usd", "100"], 1, "name one with --hardware");
    check(&["train", "--usd", "100", "--hardware", "h100,a100"], 1, "which of these is meant");
    check(&["memory"], 1, "name a model");
    check(&["memory", "no-such.gguf"], 1, "no-such.gguf");
    check(&["fit", "no-such.csv"], 1, "no-such.csv: cannot be read");
    check(&["sweep", "--flops", "1e5"], 1, "no law holds");
    check(&["sweep", "--flops", "2e15", "--unique", "1.1M"], 1, "no law holds");
    check(&["train", "--tokens", "5B"], 1, "add --params or --model");
}

#[test]
fn bad_tables_say_where() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let fails = |args: &[&str], part: &str| {
        let message = String::from_utf8_lossy(&sparsam(args).stderr).to_string();
        assert!(message.contains(part), "{args:?}: {message}");
    };
    let csv = write("runs.csv", "parameters,tokens,loss\n1e6,2e7,3.5\n1e6,x,3\n");
    fails(&["fit", &csv], "line 3: tokens is `x`");
    let card = write("card.toml", "[[accelerator]]\nname = 'x'\npower = 3\n");
    fails(&["train", "--flops", "1e20", "--hardware", &card], "card.toml: hardware table");
    let law = write("law.json", "{\"law\": 3}");
    fails(&["train", "--flops", "1e20", "--law", &law], "no fit; write one with");
    assert!(Path::new(&csv).exists());
}

#[test]
fn examples_of_the_help_run() {
    let folder = tempfile::tempdir().unwrap();
    let help = |args: &[&str]| String::from_utf8(sparsam(&[args, &["--help"]].concat()).stdout).unwrap();
    let mut run = 0;
    for question in ["train", "memory", "serve", "sweep"] {
        let text = help(&[question]);
        let examples = text.split("Examples:\n").nth(1).unwrap_or_else(|| panic!("no examples: {text}"));
        for line in examples.lines().filter_map(|l| l.trim().strip_prefix("sparsam plan ")) {
            // Files of the reader's own are not here; notes stand two spaces apart.
            let command = line.split("   ").next().unwrap();
            if ["model.gguf", "my-cards", "fit.json"].iter().any(|f| command.contains(f)) {
                continue;
            }
            let words: Vec<&str> = command.split_whitespace().collect();
            let out = Command::new(env!("CARGO_BIN_EXE_sparsam"))
                .arg("plan")
                .args(&words)
                .current_dir(folder.path())
                .output()
                .unwrap();
            assert!(out.status.success(), "{command}: {}", String::from_utf8_lossy(&out.stderr));
            run += 1;
        }
    }
    assert!(run >= 10, "only {run} examples found");
}
