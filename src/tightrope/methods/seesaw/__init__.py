"""More linear work for less nonlinear work (Li, Zhai, Cai, Gao, Seesaw, ICML 2024)."""
