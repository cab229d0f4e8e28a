"""The public ops: validate, flatten to rows, choose a backend, differentiate."""
