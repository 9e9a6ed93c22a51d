//! The few pickle opcodes that weights need. Plain opcodes only, no memo: `torch.load(weights_only=True)` allows them all.

/// Builds a pickle from the bottom of the stack up.
pub(super) struct Pickle(Vec<u8>);

impl Pickle {
    pub(super) fn new(protocol: u8) -> Self {
        Self(vec![0x80, protocol])
    }

    /// `module.name`.
    pub(super) fn global(&mut self, module: &str, name: &str) -> &mut Self {
        self.0.push(b'c');
        self.0.extend_from_slice(module.as_bytes());
        self.0.push(b'\n');
        self.0.extend_from_slice(name.as_bytes());
        self.0.push(b'\n');
        self
    }

    pub(super) fn text(&mut self, s: &str) -> &mut Self {
        self.0.push(b'X');
        self.length(s.len());
        self.0.extend_from_slice(s.as_bytes());
        self
    }

    /// `bytes`, protocol 3; callers keep them below 4 GiB.
    pub(super) fn bytes(&mut self, b: &[u8]) -> &mut Self {
        self.0.push(b'B');
        self.length(b.len());
        self.0.extend_from_slice(b);
        self
    }

    pub(super) fn int(&mut self, n: i64) -> &mut Self {
        match i32::try_from(n) {
            Ok(n) => {
                self.0.push(b'J');
                self.0.extend_from_slice(&n.to_le_bytes());
            }
            Err(_) => {
                self.0.extend_from_slice(&[0x8a, 8]);
                self.0.extend_from_slice(&n.to_le_bytes());
            }
        }
        self
    }

    pub(super) fn size(&mut self, n: usize) -> &mut Self {
        self.int(i64::try_from(n).unwrap_or(i64::MAX))
    }

    pub(super) fn bool(&mut self, b: bool) -> &mut Self {
        self.op(if b { 0x88 } else { 0x89 })
    }

    pub(super) fn none(&mut self) -> &mut Self {
        self.op(b'N')
    }

    pub(super) fn mark(&mut self) -> &mut Self {
        self.op(b'(')
    }

    /// What lies above the mark, as a tuple.
    pub(super) fn tuple(&mut self) -> &mut Self {
        self.op(b't')
    }

    pub(super) fn empty_tuple(&mut self) -> &mut Self {
        self.op(b')')
    }

    pub(super) fn empty_dict(&mut self) -> &mut Self {
        self.op(b'}')
    }

    /// `callable(*tuple)`.
    pub(super) fn reduce(&mut self) -> &mut Self {
        self.op(b'R')
    }

    /// `object.__setstate__(state)`.
    pub(super) fn build(&mut self) -> &mut Self {
        self.op(b'b')
    }

    /// Keys and values above the mark go into the mapping below it.
    pub(super) fn set_items(&mut self) -> &mut Self {
        self.op(b'u')
    }

    pub(super) fn persistent_id(&mut self) -> &mut Self {
        self.op(b'Q')
    }

    pub(super) fn sizes(&mut self, sizes: &[usize]) -> &mut Self {
        self.mark();
        for n in sizes {
            self.size(*n);
        }
        self.tuple()
    }

    pub(super) fn stop(mut self) -> Vec<u8> {
        self.0.push(b'.');
        self.0
    }

    fn op(&mut self, op: u8) -> &mut Self {
        self.0.push(op);
        self
    }

    fn length(&mut self, n: usize) {
        self.0.extend_from_slice(&u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes());
    }
}
