//! A pickle reader that builds data and nothing else: a callable it does not know ends the reading.
//!
//! Values live in one arena and name each other by index, so a deeply nested or self-referring pickle can neither overflow
//! the stack nor leak.

use std::collections::HashMap;

use tch::Kind;

use super::archive::Fault;

/// Index of a value in [`Pickle::values`].
pub(super) type Id = usize;

/// A value as far as weights need it.
#[derive(Clone, Debug)]
pub(super) enum Value {
    Int(i64),
    Text(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(String),
    Storage {
        key: String,
        kind: Kind,
        numel: u64,
    },
    Tensor(TensorRef),
    /// Known to be harmless and of no use here: floats, bytes, None, arguments of a training script.
    Inert,
}

/// A tensor over a storage held elsewhere.
#[derive(Clone, Debug)]
pub(super) struct TensorRef {
    pub(super) storage: String,
    pub(super) kind: Kind,
    /// Elements in the whole storage.
    pub(super) numel: u64,
    pub(super) offset: i64,
    pub(super) size: Vec<i64>,
    pub(super) stride: Vec<i64>,
}

/// One pickle, read.
pub(super) struct Pickle {
    pub(super) values: Vec<Value>,
    pub(super) root: Id,
    /// Bytes used, the final `.` included.
    pub(super) length: usize,
}

impl Pickle {
    pub(super) fn get(&self, id: Id) -> &Value {
        &self.values[id]
    }

    pub(super) fn read(bytes: &[u8]) -> Result<Pickle, Fault> {
        let mut machine = Machine {
            bytes,
            at: 0,
            values: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            copied: 0,
        };
        let root = machine.run()?;
        Ok(Pickle { values: machine.values, root, length: machine.at })
    }
}

/// Classes that training scripts leave beside the weights. They become [`Value::Inert`].
const HARMLESS: &[&str] = &[
    "argparse.Namespace",
    "types.SimpleNamespace",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "datetime.datetime",
    "_codecs.encode",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "collections.defaultdict",
    "collections.Counter",
    "builtins.set",
    "__builtin__.set",
    "builtins.dict",
    "builtins.list",
    "builtins.int",
    "builtins.float",
    "torch.device",
    "torch.Size",
    "torch._utils._rebuild_device_tensor_from_numpy",
    "torch.serialization._get_layout",
];

const REBUILD_TENSOR: [&str; 2] = ["torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"];
const REBUILD_PARAMETER: [&str; 2] = ["torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"];
const ORDERED_DICT: &str = "collections.OrderedDict";

fn storage_kind(global: &str) -> Option<Kind> {
    Some(match global {
        "torch.FloatStorage" => Kind::Float,
        "torch.DoubleStorage" => Kind::Double,
        "torch.HalfStorage" => Kind::Half,
        "torch.BFloat16Storage" => Kind::BFloat16,
        "torch.LongStorage" => Kind::Int64,
        "torch.IntStorage" => Kind::Int,
        "torch.ShortStorage" => Kind::Int16,
        "torch.CharStorage" => Kind::Int8,
        "torch.ByteStorage" => Kind::Uint8,
        "torch.BoolStorage" => Kind::Bool,
        _ => return None,
    })
}

fn is_known(global: &str) -> bool {
    // A dtype is a bare attribute of torch, all lower case: torch.float32.
    let dtype = global.strip_prefix("torch.").is_some_and(|name| {
        ["float", "int", "uint", "bfloat", "bool", "half", "double", "long"].iter().any(|kind| name.starts_with(kind))
            && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
    });
    dtype
        || global == ORDERED_DICT
        || storage_kind(global).is_some()
        || REBUILD_TENSOR.contains(&global)
        || REBUILD_PARAMETER.contains(&global)
        || HARMLESS.contains(&global)
}

fn broken(what: &str) -> Fault {
    Fault::Damaged(format!("pickle: {what}"))
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    values: Vec<Value>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: HashMap<usize, Id>,
    /// Entries copied from one value to another: shared values must not let a small file fill memory.
    copied: usize,
}

impl<'a> Machine<'a> {
    /// Opcodes as `pickletools` documents them, protocols 0 to 5 as far as `torch.save` and its kin write them.
    fn run(&mut self) -> Result<Id, Fault> {
        loop {
            match self.byte()? {
                0x80 => drop(self.byte()?),
                0x95 => drop(self.take(8)?),
                b'.' => return self.pop(),
                b'(' => self.marks.push(self.stack.len()),
                b'0' => drop(self.pop()?),
                b'1' => drop(self.pop_mark()?),
                b'2' => {
                    let top = *self.stack.last().ok_or_else(|| broken("empty stack"))?;
                    self.stack.push(top);
                }
                b'N' | 0x88 | 0x89 => self.push(Value::Inert),
                b'J' => {
                    let value = i32::from_le_bytes(self.array()?);
                    self.push(Value::Int(value.into()));
                }
                b'K' => {
                    let value = self.byte()?;
                    self.push(Value::Int(value.into()));
                }
                b'M' => {
                    let value = u16::from_le_bytes(self.array()?);
                    self.push(Value::Int(value.into()));
                }
                0x8a => {
                    let length = self.byte()?.into();
                    self.long(length)?;
                }
                0x8b => {
                    let length = self.length4()?;
                    self.long(length)?;
                }
                b'I' | b'L' => {
                    let value = self.line()?.trim_end_matches('L').parse().map_or(Value::Inert, Value::Int);
                    self.push(value);
                }
                b'F' => {
                    self.line()?;
                    self.push(Value::Inert);
                }
                b'G' => {
                    self.take(8)?;
                    self.push(Value::Inert);
                }
                b'X' | b'T' => {
                    let length = self.length4()?;
                    self.text(length)?;
                }
                0x8c | b'U' => {
                    let length = self.byte()?.into();
                    self.text(length)?;
                }
                0x8d => {
                    let length = self.length8()?;
                    self.text(length)?;
                }
                b'V' | b'S' => {
                    let value = self.line()?.trim_matches(['\'', '"']).to_owned();
                    self.push(Value::Text(value));
                }
                b'B' => {
                    let length = self.length4()?;
                    self.skip(length)?;
                }
                b'C' => {
                    let length = self.byte()?.into();
                    self.skip(length)?;
                }
                0x8e | 0x96 => {
                    let length = self.length8()?;
                    self.skip(length)?;
                }
                b')' => self.push(Value::Tuple(Vec::new())),
                b']' | 0x8f => self.push(Value::List(Vec::new())),
                b'}' => self.push(Value::Dict(Vec::new())),
                b't' => {
                    let items = self.pop_mark()?;
                    self.push(Value::Tuple(items));
                }
                count @ 0x85..=0x87 => {
                    let from = self.depth(usize::from(count - 0x84))?;
                    let items = self.stack.split_off(from);
                    self.push(Value::Tuple(items));
                }
                b'l' | 0x91 => {
                    let items = self.pop_mark()?;
                    self.push(Value::List(items));
                }
                b'd' => {
                    let items = self.pop_mark()?;
                    self.push(Value::Dict(pairs(&items)?));
                }
                b'a' => {
                    let item = self.pop()?;
                    self.extend_list(&[item])?;
                }
                b'e' | 0x90 => {
                    let items = self.pop_mark()?;
                    self.extend_list(&items)?;
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.extend_dict(&[key, value])?;
                }
                b'u' => {
                    let items = self.pop_mark()?;
                    self.extend_dict(&items)?;
                }
                b'c' => {
                    let (module, name) = (self.line()?.to_owned(), self.line()?.to_owned());
                    self.global(&module, &name)?;
                }
                0x93 => {
                    let (name, module) = (self.pop_text()?, self.pop_text()?);
                    self.global(&module, &name)?;
                }
                b'R' | 0x81 => {
                    let (arguments, callable) = (self.pop()?, self.pop()?);
                    self.call(callable, arguments)?;
                }
                0x92 => {
                    let (_keywords, arguments, callable) = (self.pop()?, self.pop()?, self.pop()?);
                    self.call(callable, arguments)?;
                }
                // State of an object: an OrderedDict's attributes, a namespace's fields.
                b'b' => drop(self.pop()?),
                b'p' => {
                    let slot = self.line()?.parse().map_err(|_| broken("memo index"))?;
                    self.memoize(slot)?;
                }
                b'q' => {
                    let slot = self.byte()?.into();
                    self.memoize(slot)?;
                }
                b'r' => {
                    let slot = self.length4()?;
                    self.memoize(slot)?;
                }
                0x94 => self.memoize(self.memo.len())?,
                b'g' => {
                    let slot = self.line()?.parse().map_err(|_| broken("memo index"))?;
                    self.recall(slot)?;
                }
                b'h' => {
                    let slot = self.byte()?.into();
                    self.recall(slot)?;
                }
                b'j' => {
                    let slot = self.length4()?;
                    self.recall(slot)?;
                }
                b'Q' => {
                    let id = self.pop()?;
                    let storage = self.storage(id)?;
                    self.push(storage);
                }
                other => return Err(broken(&format!("opcode {other:#04x} is not expected in weights"))),
            }
        }
    }

    fn byte(&mut self) -> Result<u8, Fault> {
        Ok(self.take(1)?[0])
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], Fault> {
        let end = self.at.checked_add(length).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or_else(|| broken("it ends too early"))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        self.take(N)?.try_into().map_err(|_| broken("it ends too early"))
    }

    fn length4(&mut self) -> Result<usize, Fault> {
        Ok(u32::from_le_bytes(self.array()?) as usize)
    }

    fn length8(&mut self) -> Result<usize, Fault> {
        usize::try_from(u64::from_le_bytes(self.array()?)).map_err(|_| broken("it ends too early"))
    }

    fn line(&mut self) -> Result<&'a str, Fault> {
        let rest = &self.bytes[self.at..];
        let end = rest.iter().position(|&byte| byte == b'\n').ok_or_else(|| broken("it ends too early"))?;
        self.at += end + 1;
        std::str::from_utf8(&rest[..end]).map_err(|_| broken("text is not UTF-8"))
    }

    fn push(&mut self, value: Value) {
        self.stack.push(self.values.len());
        self.values.push(value);
    }

    fn text(&mut self, length: usize) -> Result<(), Fault> {
        let text = std::str::from_utf8(self.take(length)?).map_err(|_| broken("text is not UTF-8"))?.to_owned();
        self.push(Value::Text(text));
        Ok(())
    }

    fn skip(&mut self, length: usize) -> Result<(), Fault> {
        self.take(length)?;
        self.push(Value::Inert);
        Ok(())
    }

    fn long(&mut self, length: usize) -> Result<(), Fault> {
        let bytes = self.take(length)?;
        let mut wide = [if bytes.last().is_some_and(|&top| top >= 0x80) { 0xff } else { 0 }; 8];
        let value = if bytes.len() <= 8 {
            wide[..bytes.len()].copy_from_slice(bytes);
            Value::Int(i64::from_le_bytes(wide))
        } else {
            Value::Inert
        };
        self.push(value);
        Ok(())
    }

    /// Index of the `count`-th value from the top, never below the newest mark.
    fn depth(&self, count: usize) -> Result<usize, Fault> {
        let floor = self.marks.last().copied().unwrap_or(0);
        self.stack.len().checked_sub(count).filter(|&from| from >= floor).ok_or_else(|| broken("empty stack"))
    }

    fn pop(&mut self) -> Result<Id, Fault> {
        self.depth(1)?;
        self.stack.pop().ok_or_else(|| broken("empty stack"))
    }

    fn pop_mark(&mut self) -> Result<Vec<Id>, Fault> {
        let from = self.marks.pop().ok_or_else(|| broken("no mark"))?;
        Ok(self.stack.split_off(from))
    }

    fn pop_text(&mut self) -> Result<String, Fault> {
        let top = self.pop()?;
        match &self.values[top] {
            Value::Text(text) => Ok(text.clone()),
            _ => Err(broken("a name is no text")),
        }
    }

    fn extend_list(&mut self, items: &[Id]) -> Result<(), Fault> {
        let top = *self.stack.last().ok_or_else(|| broken("empty stack"))?;
        match &mut self.values[top] {
            Value::List(list) => list.extend(items),
            Value::Inert => {}
            _ => return Err(broken("append to what is no list")),
        }
        Ok(())
    }

    fn extend_dict(&mut self, items: &[Id]) -> Result<(), Fault> {
        let top = *self.stack.last().ok_or_else(|| broken("empty stack"))?;
        let entries = pairs(items)?;
        match &mut self.values[top] {
            Value::Dict(dict) => dict.extend(entries),
            Value::Inert => {}
            _ => return Err(broken("items set on what is no dictionary")),
        }
        Ok(())
    }

    fn memoize(&mut self, slot: usize) -> Result<(), Fault> {
        let top = *self.stack.last().ok_or_else(|| broken("empty stack"))?;
        self.memo.insert(slot, top);
        Ok(())
    }

    fn recall(&mut self, slot: usize) -> Result<(), Fault> {
        let id = *self.memo.get(&slot).ok_or_else(|| broken("memo index"))?;
        self.stack.push(id);
        Ok(())
    }

    fn global(&mut self, module: &str, name: &str) -> Result<(), Fault> {
        let global = format!("{module}.{name}");
        if !is_known(&global) {
            return Err(Fault::Unsafe(global));
        }
        self.push(Value::Global(global));
        Ok(())
    }

    fn call(&mut self, callable: Id, arguments: Id) -> Result<(), Fault> {
        let Value::Global(global) = self.values[callable].clone() else {
            return Err(broken("a call of what is no global"));
        };
        let Value::Tuple(arguments) = self.values[arguments].clone() else {
            return Err(broken("arguments are no tuple"));
        };
        self.spend(arguments.len())?;
        let value = if REBUILD_TENSOR.contains(&global.as_str()) {
            Value::Tensor(self.tensor(&arguments)?)
        } else if REBUILD_PARAMETER.contains(&global.as_str()) {
            match arguments.first().map(|&first| &self.values[first]) {
                Some(Value::Tensor(tensor)) => Value::Tensor(tensor.clone()),
                _ => return Err(broken("a parameter without a tensor")),
            }
        } else if global == ORDERED_DICT {
            self.ordered_dict(&arguments)?
        } else {
            Value::Inert
        };
        self.push(value);
        Ok(())
    }

    /// `OrderedDict()` or, from old Pythons, `OrderedDict([[key, value], …])`.
    fn ordered_dict(&mut self, arguments: &[Id]) -> Result<Value, Fault> {
        let Some(&first) = arguments.first() else { return Ok(Value::Dict(Vec::new())) };
        let Value::List(items) = &self.values[first] else { return Err(broken("OrderedDict of what is no list")) };
        let items = items.clone();
        self.spend(items.len())?;
        let entries = items.iter().map(|&item| match &self.values[item] {
            Value::List(pair) | Value::Tuple(pair) if pair.len() == 2 => Ok((pair[0], pair[1])),
            _ => Err(broken("OrderedDict of what are no pairs")),
        });
        Ok(Value::Dict(entries.collect::<Result<_, Fault>>()?))
    }

    /// `_rebuild_tensor_v2(storage, offset, size, stride, …)`.
    fn tensor(&self, arguments: &[Id]) -> Result<TensorRef, Fault> {
        let [storage, offset, size, stride, ..] = arguments else { return Err(broken("a tensor lacks arguments")) };
        let Value::Storage { key, kind, numel } = &self.values[*storage] else {
            return Err(broken("a tensor lacks its storage"));
        };
        let (offset, size, stride) = (self.int(*offset)?, self.ints(*size)?, self.ints(*stride)?);
        Ok(TensorRef { storage: key.clone(), kind: *kind, numel: *numel, offset, size, stride })
    }

    /// `('storage', class, key, location, numel, …)`.
    fn storage(&self, id: Id) -> Result<Value, Fault> {
        let Value::Tuple(fields) = &self.values[id] else { return Err(broken("a storage's id is no tuple")) };
        let [tag, class, key, _location, numel, ..] = fields.as_slice() else {
            return Err(broken("a storage's id is too short"));
        };
        match (&self.values[*tag], &self.values[*class], &self.values[*key]) {
            (Value::Text(tag), Value::Global(class), Value::Text(key)) if tag == "storage" => {
                let kind = storage_kind(class).ok_or_else(|| broken(&format!("storages of {class} are not read")))?;
                let numel = u64::try_from(self.int(*numel)?).map_err(|_| broken("a storage's size is negative"))?;
                Ok(Value::Storage { key: key.clone(), kind, numel })
            }
            _ => Err(broken("a storage's id is not understood")),
        }
    }

    fn int(&self, id: Id) -> Result<i64, Fault> {
        match self.values[id] {
            Value::Int(value) => Ok(value),
            _ => Err(broken("an integer is missing")),
        }
    }

    fn spend(&mut self, entries: usize) -> Result<(), Fault> {
        self.copied += entries;
        if self.copied > self.bytes.len() { Err(broken("it copies more than it holds")) } else { Ok(()) }
    }

    fn ints(&self, id: Id) -> Result<Vec<i64>, Fault> {
        match &self.values[id] {
            Value::Tuple(items) | Value::List(items) if items.len() <= 16 => {
                items.iter().map(|&item| self.int(item)).collect()
            }
            _ => Err(broken("a shape is no tuple")),
        }
    }
}

fn pairs(items: &[Id]) -> Result<Vec<(Id, Id)>, Fault> {
    match items.as_chunks::<2>() {
        (pairs, []) => Ok(pairs.iter().map(|&[key, value]| (key, value)).collect()),
        _ => Err(broken("a key without a value")),
    }
}
