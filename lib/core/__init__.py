"""The frame that every stage stands on. Imports nothing of ours, and never torch."""
