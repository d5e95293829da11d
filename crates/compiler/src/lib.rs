//! Graph to Program: named passes, fusion into row programs, memory planning.
