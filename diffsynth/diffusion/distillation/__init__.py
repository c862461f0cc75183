"""Few-step students: who predicts, how teacher and student sample, and what tells their pictures apart."""
