//! The graph of a computation: operations, shapes, tracing, verification, and the interpreter that defines their meaning.
