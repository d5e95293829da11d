//! Single elements of every plain type as f32, the meaning of conversions: nearest even for floats, towards zero and
//! saturating for integers (NaN is 0).

use sparsam_dtype::{DType, bf16, f16};

/// Element `i` at `p`, as f32.
///
/// # Safety
/// `p` points to at least `i + 1` elements of the plain type `dtype`, aligned for it.
pub(crate) unsafe fn get(dtype: DType, p: *const u8, i: usize) -> f32 {
    // SAFETY: the caller's contract.
    unsafe {
        match dtype {
            DType::F32 => *p.cast::<f32>().add(i),
            DType::F16 => (*p.cast::<f16>().add(i)).to_f32(),
            DType::BF16 => (*p.cast::<bf16>().add(i)).to_f32(),
            DType::F64 => *p.cast::<f64>().add(i) as f32,
            DType::I8 => *p.cast::<i8>().add(i) as f32,
            DType::I16 => *p.cast::<i16>().add(i) as f32,
            DType::I32 => *p.cast::<i32>().add(i) as f32,
            DType::I64 => *p.cast::<i64>().add(i) as f32,
            DType::U8 => *p.add(i) as f32,
            _ => unreachable!("block formats are refused at the door"),
        }
    }
}

/// Writes `x` as element `i` at `p`.
///
/// # Safety
/// As for [`get`]; nothing else reads or writes the element meanwhile.
pub(crate) unsafe fn set(dtype: DType, p: *mut u8, i: usize, x: f32) {
    // SAFETY: the caller's contract.
    unsafe {
        match dtype {
            DType::F32 => *p.cast::<f32>().add(i) = x,
            DType::F16 => *p.cast::<f16>().add(i) = f16::from_f32(x),
            DType::BF16 => *p.cast::<bf16>().add(i) = bf16::from_f32(x),
            DType::F64 => *p.cast::<f64>().add(i) = x as f64,
            DType::I8 => *p.cast::<i8>().add(i) = x as i8,
            DType::I16 => *p.cast::<i16>().add(i) = x as i16,
            DType::I32 => *p.cast::<i32>().add(i) = x as i32,
            DType::I64 => *p.cast::<i64>().add(i) = x as i64,
            DType::U8 => *p.add(i) = x as u8,
            _ => unreachable!("block formats are refused at the door"),
        }
    }
}

/// `x` as an element of type `dtype` holds it, as f32.
pub(crate) fn round(dtype: DType, x: f32) -> f32 {
    let mut cell = 0u64;
    let p = (&raw mut cell).cast::<u8>();
    // SAFETY: 8 aligned bytes hold one element of any plain type.
    unsafe {
        set(dtype, p, 0, x);
        get(dtype, p, 0)
    }
}

/// As [`get`], in f64, which holds every type but I64 exactly.
///
/// # Safety
/// As for [`get`].
pub(crate) unsafe fn get_f64(dtype: DType, p: *const u8, i: usize) -> f64 {
    // SAFETY: the caller's contract.
    unsafe {
        match dtype {
            DType::F64 => *p.cast::<f64>().add(i),
            DType::I32 => *p.cast::<i32>().add(i) as f64,
            DType::I64 => *p.cast::<i64>().add(i) as f64,
            _ => get(dtype, p, i) as f64,
        }
    }
}

/// As [`set`], from f64, rounded once.
///
/// # Safety
/// As for [`set`].
pub(crate) unsafe fn set_f64(dtype: DType, p: *mut u8, i: usize, x: f64) {
    // SAFETY: the caller's contract.
    unsafe {
        match dtype {
            DType::F64 => *p.cast::<f64>().add(i) = x,
            DType::F16 => *p.cast::<f16>().add(i) = f16::from_f64(x),
            DType::BF16 => *p.cast::<bf16>().add(i) = bf16::from_f64(x),
            DType::I8 => *p.cast::<i8>().add(i) = x as i8,
            DType::I16 => *p.cast::<i16>().add(i) = x as i16,
            DType::I32 => *p.cast::<i32>().add(i) = x as i32,
            DType::I64 => *p.cast::<i64>().add(i) = x as i64,
            DType::U8 => *p.add(i) = x as u8,
            _ => set(dtype, p, i, x as f32),
        }
    }
}
