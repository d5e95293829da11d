//! Rotary frequencies of real models, as transformers computes them (`scripts/goldens/models.py`).

use serde_json::Value;
use sparsam_models::rope::{Rope, RopeConfig, Scaling, yarn_attention_factor};

#[test]
fn frequencies_are_those_of_transformers() {
    let text = include_str!("golden/rope.json");
    let models: Value = serde_json::from_str(text).unwrap();
    let models = models.as_object().unwrap();
    assert_eq!(models.len(), 4);
    for (name, m) in models {
        let real = |key: &str| m[key].as_f64().unwrap_or_else(|| panic!("{name}: {key}"));
        let original_context = || real("original_max_position_embeddings") as usize;
        let scaling = match m["rope_type"].as_str().unwrap() {
            "default" => Scaling::None,
            "linear" => Scaling::Linear { factor: real("factor") },
            "llama3" => Scaling::Llama3 {
                factor: real("factor"),
                low_freq_factor: real("low_freq_factor"),
                high_freq_factor: real("high_freq_factor"),
                original_context: original_context(),
            },
            "yarn" => {
                let attention_factor = yarn_attention_factor(real("factor"));
                assert!((attention_factor - real("attention_factor")).abs() < 1e-12);
                let (factor, original_context) = (real("factor"), original_context());
                Scaling::Yarn { factor, beta_fast: 32.0, beta_slow: 1.0, original_context, attention_factor }
            }
            other => panic!("{name}: {other}"),
        };
        let rope = Rope::new(
            "inv_freq",
            real("head_dim") as usize,
            &RopeConfig { base: real("rope_theta"), scaling },
        );
        let want = m["inv_freq"].as_array().unwrap();
        assert_eq!(rope.inv_freq().len(), want.len());
        for (j, (have, want)) in rope.inv_freq().iter().zip(want).enumerate() {
            // transformers rounds after each of up to five steps, half a unit in the last place (6e-8) each.
            let (have, want) = (*have as f64, want.as_f64().unwrap());
            assert!((have - want).abs() <= 5.0 * 6e-8 * want, "{name}: pair {j}: {have:e} and {want:e}");
        }
    }
}
