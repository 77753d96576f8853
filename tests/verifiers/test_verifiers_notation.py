r"""Notations that real answers have, one family a table: KIND gold :: response, R right, W wrong; judged in this process."""

import pytest

from r2vpo_jax.verifiers import answers, extract

pytest.importorskip("math_verify")

FAMILIES = {
    "digit groups": r"""
R math 10,\!080 :: \boxed{10080}
R math 10,\!080 :: \boxed{10,080}
R math 10080 :: \boxed{10,\!080}
R math 10080 :: \boxed{10{,}\!080}
R math 12,500\pi :: \boxed{12500\pi}
R math 12500\pi :: \boxed{12{,}500\pi}
R math \frac{1}{10,\!000} :: \boxed{0.0001}
R math \frac{1}{10,000} :: \boxed{0.0001}
R math 41352, 42351 :: \boxed{41,\!352, 42,\!351}
R math 0,1 :: \boxed{1,0}
R numeric 10,\!080.5 :: \boxed{10080.5}
R numeric 10080 :: \boxed{10,\!080}
R exact 10,\!080 :: \boxed{10080}
W math 10,\!080 :: \boxed{80, 10}
W math 100 :: \boxed{0,100}
W math 12 :: \boxed{1,2}
""",
    "numbers in expressions": r"""
R math \frac{3}{4} :: So the probability is $\frac{3}{4}$.
R math 1024 :: There are $2^{10}$ subsets.
R math [0,5] :: The interval is [0, 5].
R math 25 :: The area is 25 cm^2.
R math 4:30 :: We meet at 4:30.
R math 4:30\text{ p.m.} :: We meet at 4:30 PM.
R math \{1,2\} :: The solutions are 1 and 2.
R math 18 :: She makes 18 dollars (9 times 2).
R math 18 :: She makes 9 * 2 = $18 every day.
R math 10 :: She spent $5 and $6, so $10 is left.
R math 34 :: The largest $n$ is 34.
R math 0.5 :: So $p = \frac{1}{2} = 0.5$.
R numeric 3.5 :: It takes 3 1/2 hours.
R numeric 18 :: She eats 18 on the 2nd day.
W math 4 :: So the probability is $\frac{3}{4}$.
W math 4 :: So the probability is \frac{3}{4}.
W math 10 :: There are $2^{10}$ subsets.
W math 5 :: The interval is $[0, 5]$.
W math 5 :: The interval is [0, 5].
W math 2 :: It is $\sqrt{2}$.
W math 2 :: It is x^2
W math 2 :: The area is 25 cm^2.
W math 30 :: We meet at 4:30.
W math 5 :: The ratio is 3:5.
W math 3 :: It is \log_2 3.
W math 3 :: With radius 3 the length is $6\pi$.
W math 2 :: The solutions are 1 and 2.
W numeric 0.5 :: It takes 3 1/2 hours.
R math 1,2 :: The solutions are x = 1 and x = 2.
R math 1,2,3 :: The solutions are $x=1$, $x=2$, and $x=3$.
R math 7 :: If x = 3, y = 7.
R math 10 :: With $a=3$ and $b=7$ we get $a+b=10$.
R math 5000000 :: The population is 5 million people.
R math 7:00\text{ p.m.} :: They leave at 7 p.m.
R math 18 :: She makes 9*2=<<9*2=18>>18 dollars.
W math 2 :: So x=1 or x=2.
W math 2 :: The solutions are $x=1$ and $x=2$.
W math 2 :: The solutions are $1$ and $2$.
W math 5 :: The population is 5 million.
""",
    "sentences after answer": r"""
R math 34 :: Final Answer: The largest $n$ is 34.
R math 18 :: **Answer:** She makes 18 dollars every day.
R math 18 :: The answer is that she makes $18.
R math 3 :: The answer is 3 (since 1+2=3).
R math 12 :: The answer is 12, not 13.
R math \text{no solution} :: The answer is no solution.
W math 5 :: The answer is not 5.
W math 5 :: We have 5 apples. The final answer is
R math 12 :: The answer is **12** dollars.
R math 8 :: **Answer:** 2**3
""",
    "upright": r"""
R math 1-\frac{1}{e} :: \boxed{1-\frac{1}{\mathrm{e}}}
R math \arctan 2 :: \boxed{\operatorname{arctan} 2}
R math \ln 2 :: \boxed{\mathrm{ln}\,2}
R math \operatorname{lcm}(4,6) :: \boxed{12}
R math \max\{1,|z|\} :: \boxed{\operatorname{max}(|z|,1)}
R math \sec x :: \boxed{\operatorname{sec} x}
R math e^e :: \boxed{\mathrm{e}^{\mathrm{e}}}
R math \log_{10} 5 :: \boxed{\lg 5}
R math 5 :: \boxed{5\text{ sec}}
R math 5\text{ min} :: \boxed{5\text{ minutes}}
R math \mathbf{v} :: \boxed{v}
W math \ln 2 :: \boxed{\mathrm{lg}\,2}
""",
    "arguments without braces": r"""
R math \frac{\pi}{2} :: \boxed{\frac\pi2}
R math \frac{\pi}{4} :: \boxed{\frac \pi 4}
R math \frac{12}{13} :: \boxed{\frac{12}13}
R math \frac{a}{b} :: \boxed{\frac ab}
R math \frac{\sqrt{3}}{2} :: \boxed{\frac{\sqrt3}2}
R math \frac{1}{2} :: \boxed{{1 \over 2}}
R math {5 \choose 2} :: \boxed{10}
R math 10 :: \boxed{C_5^2}
R math 10 :: \boxed{C(5,2)}
""",
    "choices": r"""
R math B :: \boxed{\textbf{(B) }12}
R math B :: \boxed{\textbf{(B)}\ 12}
R math B :: \boxed{B. 12}
R math B :: The correct answer is (B) 12.
R math \textbf{(B) }12 :: \boxed{B}
R math \textbf{(B) }12 :: \boxed{12}
W math B :: \boxed{(C) 12}
W math B :: \boxed{A or B}
W math B :: \boxed{A/B}
W math B :: \boxed{(B) or (C)}
W math B :: \boxed{(A) 1, (B) 2}
W math \textbf{(B) }12 :: \boxed{(B) 13}
R math C :: The correct option is C.
R math C :: \boxed{\text{Option C}}
R math C :: The correct answer is option C.
""",
    "units": r"""
R math 10\sqrt{3} :: \boxed{10\sqrt{3} cm}
R math 12\pi :: \boxed{12\pi cm}
R math 3\text{ m/s} :: \boxed{3 \frac{m}{s}}
R math 5 \mathrm{~m} \mathrm{~s}^{-1} :: \boxed{5\text{ m/s}}
R math 5 \mathrm{~m} / \mathrm{s} :: \boxed{5}
R math 5 :: \boxed{5\ \text{kg}\cdot\text{m}^2/\text{s}^2}
R math 51 (trucks) :: \boxed{51}
R math \text{4:30 p.m.} :: \boxed{4:30 PM}
R math 3:30\text{ p.m.} :: \boxed{15:30}
W math 15\text{ m/s}^2 :: \boxed{15\text{ m/s}}
W math 5\text{ mW} :: \boxed{5\text{ MW}}
W math 3:30\text{ p.m.} :: \boxed{3:30\text{ a.m.}}
R math 7\text{ a.m.} :: \boxed{7:00 a.m.}
R math 32 :: \boxed{32 €}
R math 25\text{ cents} :: \boxed{25¢}
R math 5\% :: \boxed{5\%\text{ increase}}
R math 1010_2 :: \boxed{1010 \text{ (base 2)}}
R math 1010_2 :: \boxed{(1010)_2}
W math 1010_2 :: \boxed{1010\text{ base }3}
W math 5\% :: \boxed{5\text{ cm}}
W math 5\text{ m} :: \boxed{5\text{ M}}
W math 7:00\text{ p.m.} :: \boxed{7}
""",
    "names": r"""
R math E_{1},E_{2} :: \boxed{E_2, E_1}
R math \frac{1}{3} E_{1}+\frac{2}{3} E_{2} :: \boxed{\frac{E_1+2E_2}{3}}
R math m_{\max }=n^{2}-n-1 :: \boxed{m_{\text{max}} = n^2-n-1}
R math \mathbb{Z}_8 :: \boxed{\mathbb{Z}_{8}}
R math \aleph_0 :: \boxed{\aleph_{0}}
R math A^\top :: \boxed{A^T}
R math m_{p} c^{2}\left(\gamma^{2}-1\right) \sin ^{2} \theta :: \boxed{m_p c^2 (\gamma^2-1)\sin^2\theta}
R math np.arcsin(10/13) :: \boxed{\arcsin(10/13)}
R math \frac{e^{2 i t}}{(2+2 i)} :: \boxed{\frac{e^{2it}}{2+2i}}
W math \frac{1}{3} E_{1}+\frac{2}{3} E_{2} :: \boxed{\frac{2E_1+E_2}{3}}
W math \mathbb{Z}_8 :: \boxed{\mathbb{Z}_{4}}
W math A^T :: \boxed{A}
W math R-r :: \boxed{0}
W math x'+1 :: \boxed{1+x}
W math \gamma :: \boxed{0.5772156649}
""",
    "membership and order": r"""
R math \theta\in(0,\pi) :: \boxed{(0,\pi)}
R math (0,\pi) :: \boxed{\theta\in(0,\pi)}
R math [1,2] :: \boxed{f(x)\in[1,2]}
R math [1,2] :: \boxed{a_1\in[1,2]}
R math k\pi, k\in\mathbb{Z} :: \boxed{k\pi, k \in \mathbb Z}
R math -1<x \leqslant 1:(-1,1] :: \boxed{(-1,1]}
R math No solution : \oslash :: \boxed{\emptyset}
R math (-\infty,1)\cup(3,\infty) :: \boxed{x<1\text{ or }x>3}
W math x>0 :: \boxed{x>10^{-20}}
W math x>0 :: \boxed{y>0}
R math (-\infty,\infty) :: \boxed{\mathbb{R}}
R math \mathbb{R} :: \boxed{\text{all real numbers}}
R math (-\infty,0)\cup(0,\infty) :: \boxed{\mathbb{R}\backslash\{0\}}
R math (-\infty,1]\cup[3,\infty) :: \boxed{\left(-\infty,1\right] \bigcup \left[3,\infty\right)}
R math (3,4] :: \boxed{]3,4]}
R math \emptyset :: \boxed{\text{No solutions}}
R math 5 :: \boxed{5 = x}
R math (2,1) :: \boxed{y=1, x=2}
W math (1,2) :: \boxed{y=1, x=2}
W math [3,4] :: \boxed{]3,4[}
""",
    "words": r"""
R math \text{May} :: \boxed{May}
R math VW :: \boxed{\text{VW}}
R math \text{ACF} :: \boxed{ACF}
R math \text{red} :: \boxed{red}
R math abc :: \boxed{cba}
R exact May :: \boxed{\text{May}}
R exact VW :: \boxed{\text{VW}}
W math Sam :: \boxed{Mas}
W math red :: \boxed{der}
""",
    "lists with words": r"""
R math 1,2,3 :: \boxed{1, 2, \text{ and } 3}
R math 1 \text{ and } 2 :: \boxed{1\text{, and }2}
R math 2\text{ cm}, 3\text{ cm} :: \boxed{2\text{ cm and }3\text{ cm}}
R math 1,2 :: \boxed{\text{either } 1 \text{ or } 2}
R math \text{Alice, Bob} :: \boxed{\text{Bob and Alice}}
R math -2, 1 :: $a=\boxed{-2}$ or $a=\boxed{1}$
R math x+11, 11+x :: \boxed{x+11}
W math 1 :: \boxed{-2} or \boxed{1}
R math \pm 3 :: \boxed{\mp 3}
W math 5 :: \boxed{5, 6, \ldots}
""",
    "magnitudes": r"""
R math 9000000 :: \boxed{9 \text{ million}}
R math 9\text{ million} :: \boxed{9{,}000{,}000}
R math \$9\text{ million} :: \boxed{9 million dollars}
R math 1500000 :: \boxed{1\frac{1}{2}\text{ million}}
R math 2\pi\times10^6 :: \boxed{2\pi\text{ million}}
R math 9\text{ million} :: \boxed{9 million people}
R numeric 9000000 :: \boxed{9 million}
R exact 9000000 :: \boxed{9 million}
W math 9 :: \boxed{9\text{ million}}
W math 9\text{ million} :: \boxed{9}
W math 9\text{ million} :: \boxed{9\text{ billion}}
W numeric 9 :: \boxed{9 thousand}
W exact 9 :: \boxed{9 million}
""",
    "ratios and scripts": r"""
R math 1:2:3 :: \boxed{2:4:6}
R math 1:\sqrt{3}:2 :: \boxed{\sqrt3:3:2\sqrt3}
R math \frac{3}{4} :: \boxed{³⁄₄}
R math \ln x :: \boxed{\log_e x}
R math 0.\overline{3} :: \boxed{\sqrt{\frac{1}{9}}}
W math 1:2:3 :: \boxed{1:3:2}
W math 1:2:3 :: \boxed{\frac{1}{6}}
W math 1:2:3 :: \boxed{0:0:0}
W math 0:1:2 :: \boxed{0:2:1}
""",
    "tiny differences": r"""
R math \sqrt{3+2\sqrt{2}} :: \boxed{1+\sqrt{2}}
R math \frac{1+\sqrt{5}}{2} :: \boxed{1.618034}
R math e^{-50} :: \boxed{\frac{1}{e^{50}}}
R math 2x+3y=6 :: \boxed{x=3-\frac{3y}{2}}
W math \pi :: \boxed{\pi+10^{-20}}
W math 10^{-34}\pi :: \boxed{2\cdot 10^{-34}\pi}
W math x :: \boxed{x+10^{-20}}
W math 2x+3y=6 :: \boxed{2x+3y=6+10^{-20}}
W math e^{-50} :: \boxed{0}
W math 2^{1000} :: \boxed{2^{1000}+1}
W math \begin{pmatrix}\pi\\1\end{pmatrix} :: \boxed{\begin{pmatrix}\pi+10^{-20}\\1\end{pmatrix}}
""",
}
JUDGES = {"math": answers.same, "numeric": answers.numeric, "exact": answers.exact}


@pytest.mark.parametrize("family", FAMILIES)
def test_notation(family):
    wrong = []
    for line in FAMILIES[family].strip().splitlines():
        mark, kind, pair = line.split(" ", 2)
        gold, response = pair.split(" :: ")
        answer = extract(response) or ""
        if JUDGES[kind](gold, answer) is not (mark == "R"):
            wrong.append((line, answer))
    assert not wrong, wrong
