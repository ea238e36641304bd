"""What a run is told and what it leaves: its config, its folder, its records.

In come plain values and what a step computed; out go files that a resumed run and the report read.
"""
