//! Strided layouts: how the elements of a tensor lie in a buffer.

/// A strided view of a buffer, in elements: shape, strides and the offset of element `[0, 0, ..]`.
///
/// A stride of 0 repeats an element (broadcast). Strides are never negative.
///
/// ```
/// use sparsam_dtype::Layout;
/// let l = Layout::contiguous(&[2, 3]);
/// assert_eq!(l.strides, [3, 1]);
/// assert_eq!(l.permute(&[1, 0]).strides, [1, 3]);
/// assert_eq!(l.slice(1, 1, 2).offset, 1);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// Length of each axis.
    pub shape: Vec<usize>,
    /// Elements between neighbours along each axis.
    pub strides: Vec<usize>,
    /// Elements before `[0, 0, ..]`.
    pub offset: usize,
}

impl Layout {
    /// The row-major layout of `shape` at offset 0.
    pub fn contiguous(shape: &[usize]) -> Layout {
        let mut strides = vec![1; shape.len()];
        for i in (1..shape.len()).rev() {
            strides[i - 1] = strides[i] * shape[i].max(1);
        }
        Layout { shape: shape.to_vec(), strides, offset: 0 }
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// One past the largest element index that the view touches; 0 for an empty view.
    pub fn end(&self) -> usize {
        if self.numel() == 0 {
            return 0;
        }
        self.offset + self.shape.iter().zip(&self.strides).map(|(&n, &s)| (n - 1) * s).sum::<usize>() + 1
    }

    /// Whether the elements lie row-major without gaps (axes of length 1 may have any stride).
    pub fn is_contiguous(&self) -> bool {
        let mut want = 1;
        for (&n, &s) in self.shape.iter().zip(&self.strides).rev() {
            if n != 1 && s != want {
                return false;
            }
            want *= n;
        }
        true
    }

    /// Axes reordered: axis `i` of the result is axis `axes[i]` of `self`.
    pub fn permute(&self, axes: &[usize]) -> Layout {
        Layout {
            shape: axes.iter().map(|&a| self.shape[a]).collect(),
            strides: axes.iter().map(|&a| self.strides[a]).collect(),
            offset: self.offset,
        }
    }

    /// Elements `start..end` along `axis`.
    pub fn slice(&self, axis: usize, start: usize, end: usize) -> Layout {
        let mut l = self.clone();
        l.shape[axis] = end - start;
        l.offset += start * self.strides[axis];
        l
    }

    /// Axes of length 1 repeated to `shape` (same rank) with stride 0.
    pub fn broadcast(&self, shape: &[usize]) -> Layout {
        let mut l = self.clone();
        for (i, &n) in shape.iter().enumerate() {
            if l.shape[i] != n {
                debug_assert_eq!(l.shape[i], 1);
                l.strides[i] = 0;
                l.shape[i] = n;
            }
        }
        l
    }

    /// The same elements in the same order under another shape, if strides can say it; `None` if a copy is needed.
    pub fn reshape(&self, shape: &[usize]) -> Option<Layout> {
        debug_assert_eq!(self.numel(), shape.iter().product::<usize>());
        if self.numel() == 0 {
            return Some(Layout { offset: self.offset, ..Layout::contiguous(shape) });
        }
        // Merge the old axes into runs that are contiguous among themselves, then split the runs anew.
        let mut runs: Vec<(usize, usize)> = Vec::new(); // (length, stride of the innermost element)
        for (&n, &s) in self.shape.iter().zip(&self.strides) {
            if n == 1 {
                continue;
            }
            match runs.last_mut() {
                Some((len, stride)) if *stride == s * n => {
                    *len *= n;
                    *stride = s;
                }
                _ => runs.push((n, s)),
            }
        }
        let mut strides = vec![0; shape.len()];
        let mut axis = shape.len();
        for (len, stride) in runs.into_iter().rev() {
            let (mut left, mut step) = (len, stride);
            while left > 1 {
                axis = axis.checked_sub(1)?;
                let n = shape[axis];
                if n == 1 {
                    strides[axis] = step;
                    continue;
                }
                if left % n != 0 {
                    return None;
                }
                strides[axis] = step;
                step *= n;
                left /= n;
            }
        }
        for a in 0..axis {
            strides[a] = 1; // axes of length 1: any stride
        }
        Some(Layout { shape: shape.to_vec(), strides, offset: self.offset })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reshape_splits_and_merges() {
        let l = Layout::contiguous(&[4, 6]);
        assert_eq!(l.reshape(&[2, 2, 3, 2]).unwrap().strides, [12, 6, 2, 1]);
        let t = l.permute(&[1, 0]);
        assert!(t.reshape(&[24]).is_none());
        assert_eq!(t.reshape(&[3, 2, 4]).unwrap().strides, [2, 1, 6]);
        let s = l.slice(1, 0, 4); // gap at the end of each row
        assert!(s.reshape(&[16]).is_none());
        assert_eq!(s.reshape(&[4, 2, 2]).unwrap().strides, [6, 2, 1]);
        assert_eq!(s.end(), 22);
    }

    #[test]
    fn reshape_with_ones_and_broadcast() {
        let l = Layout::contiguous(&[1, 5]).broadcast(&[3, 5]);
        assert_eq!(l.strides, [0, 1]);
        assert!(l.reshape(&[15]).is_none());
        assert_eq!(l.reshape(&[3, 1, 5, 1]).unwrap().shape, [3, 1, 5, 1]);
        let one = Layout::contiguous(&[1, 1]).broadcast(&[3, 4]); // a scalar repeated: all strides 0
        assert_eq!(one.reshape(&[12]).unwrap().strides, [0]);
    }
}
