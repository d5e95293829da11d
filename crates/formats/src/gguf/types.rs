//! GGUF's numbers for tensor types (`enum ggml_type`).

use sparsam_dtype::DType;

/// The types that have a [`DType`].
const SUPPORTED: [(u32, DType); 25] = [
    (0, DType::F32),
    (1, DType::F16),
    (2, DType::Q4_0),
    (3, DType::Q4_1),
    (6, DType::Q5_0),
    (7, DType::Q5_1),
    (8, DType::Q8_0),
    (9, DType::Q8_1),
    (10, DType::Q2_K),
    (11, DType::Q3_K),
    (12, DType::Q4_K),
    (13, DType::Q5_K),
    (14, DType::Q6_K),
    (15, DType::Q8_K),
    (20, DType::IQ4_NL),
    (23, DType::IQ4_XS),
    (24, DType::I8),
    (25, DType::I16),
    (26, DType::I32),
    (27, DType::I64),
    (28, DType::F64),
    (30, DType::BF16),
    // This project's own, far from what GGUF may add.
    (0x5302, DType::S2_64),
    (0x5303, DType::S3_64),
    (0x5304, DType::S4_64),
];

/// The others, for messages.
const UNSUPPORTED: [(u32, &str); 20] = [
    (4, "Q4_2, removed from GGUF"),
    (5, "Q4_3, removed from GGUF"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4, removed from GGUF"),
    (32, "Q4_0_4_8, removed from GGUF"),
    (33, "Q4_0_8_8, removed from GGUF"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (36, "IQ4_NL_4_4, removed from GGUF"),
    (37, "IQ4_NL_4_8, removed from GGUF"),
    (38, "IQ4_NL_8_8, removed from GGUF"),
    (39, "MXFP4"),
    (40, "NVFP4"),
    (41, "Q1_0"),
];

/// The type that GGUF's `number` stands for, if it is supported.
pub fn dtype(number: u32) -> Option<DType> {
    SUPPORTED.iter().find(|(n, _)| *n == number).map(|&(_, d)| d)
}

/// GGUF's number for `dtype`; `None` for U8, which GGUF does not have.
pub fn type_number(dtype: DType) -> Option<u32> {
    SUPPORTED.iter().find(|(_, d)| *d == dtype).map(|&(n, _)| n)
}

/// The name of a type that GGUF has and this project has not.
pub fn unsupported_type_name(number: u32) -> Option<&'static str> {
    UNSUPPORTED.iter().find(|(n, _)| *n == number).map(|&(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_number_and_each_type_appears_once() {
        let mut numbers: Vec<u32> =
            SUPPORTED.iter().map(|t| t.0).chain(UNSUPPORTED.iter().map(|t| t.0)).collect();
        numbers.sort();
        assert_eq!(numbers, (0..42).chain(0x5302..=0x5304).collect::<Vec<_>>());
        for d in DType::ALL {
            // No file holds NF4, whose blocks share what the whole matrix keeps, or states of an optimiser.
            let stored = !matches!(d, DType::U8 | DType::NF4) && !d.is_state();
            assert_eq!(type_number(d).and_then(dtype), stored.then_some(d), "{d}");
        }
    }
}
