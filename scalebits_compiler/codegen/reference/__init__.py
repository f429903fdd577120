"""The reference target: one slow torch rule per op. It is the definition of the ops."""
