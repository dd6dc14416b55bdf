"""Tools, simulators and benchmark worlds that policies act in. Host side: no params."""
