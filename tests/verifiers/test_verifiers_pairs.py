r"""Pairs of a gold answer and a final answer, with what a mathematician says of them, judged through the pool.

A line of the table is `MARK gold :: answer`; the answer is put into \boxed{}.

    =  the same answer          !  another answer          ?  the gold cannot be judged against: an error, never right
    ~=, ~!  what should be said, and is not: known limitations, with the reason in the line above. They fail here as soon as
            they are mended.
"""

import pytest

from r2vpo_jax.verifiers import Check, VerifierPool
from r2vpo_jax.verifiers.outcome import Outcome

TABLE = r"""
# Integers and decimals
= 42 :: 42
= 42 :: 42.
= 42 :: $42$
= 42 :: \(42\)
= 42 :: **42**
= 42 :: +42
= 42 :: 42.0
= 42 :: \text{42}
= 42 :: \mathbf{42}
= 42 :: { 42 }
= 1000 :: 1,000
= 1000 :: 1{,}000
= 1000 :: 1\,000
= 1,234,567 :: 1234567
= 0 :: -0
= 0.5 :: .5
= 0.5 :: 0.50
= -3 :: −3
= -3 :: {-3}
= 7 :: ７
= 12 :: (12)
= 42 :: 40+2
= 6 :: 2\cdot 3
= 6 :: 2\times3
= 6 :: 2*3
= 1024 :: 2^{10}
= 1024 :: 2^10
= 1024 :: 2**10
= 120 :: 5!
= 10 :: \binom{5}{2}
! 42 :: 43
! 42 :: -42
! 42 :: 4.2
! 42 :: 420
! 42 :: 42x
! 1000 :: 1,00
! 0 :: 0.0000001
! 0.5 :: 0.5000001
! 100 :: 99.999999999
! 1 :: \frac{1}{0}
! 1 :: \infty
! 1 :: True
! 3 :: 3!
! 6 :: 2^3

# Fractions and mixed numbers
= \frac{1}{2} :: 1/2
= \frac{1}{2} :: \dfrac{1}{2}
= \frac{1}{2} :: \tfrac12
= \frac{1}{2} :: \frac12
= \frac{1}{2} :: \frac{2}{4}
= \frac{1}{2} :: 0.5
= \frac{1}{2} :: ½
= \frac{1}{2} :: \frac{1}{2}.
= \frac{1}{2} :: \left(\frac{1}{2}\right)
= \frac12 :: 2^{-1}
= -\frac{1}{2} :: \frac{-1}{2}
= -\frac{1}{2} :: -1/2
= \frac{-1}{2} :: \frac{1}{-2}
= \frac{3}{2} :: 1\frac{1}{2}
= \frac{3}{2} :: 1 \frac{1}{2}
= \frac{3}{2} :: 1 1/2
= \frac{3}{2} :: 1½
= -\frac{3}{2} :: -1\frac{1}{2}
= \frac{1}{3} :: 0.333333
= \frac{1}{3} :: 0.\overline{3}
= \frac{2}{3} :: 0.666667
= \frac{41}{333} :: 0.\overline{123}
= \frac{1000}{3} :: 1,000/3
! \frac{1}{3} :: 0.333
! \frac{1}{3} :: 0.3
! \frac{1}{2} :: \frac{1}{3}
! \frac{1}{2} :: 2
! \frac{1}{2} :: -\frac{1}{2}
! \frac{3}{2} :: 1 + \frac{1}{3}
! \frac{3}{2} :: \frac{11}{2}
! \frac{1}{2} :: the half \frac{1}{2} of $x$!

# Scientific notation
= 35000 :: 3.5\times 10^4
= 35000 :: 3.5 \times 10^{4}
= 35000 :: 3.5e4
= 35000 :: 3.5 × 10⁴
= 35000 :: 3.5 \cdot 10^{4}
= 100000 :: 10^5
= 0.00035 :: 3.5\times10^{-4}
= 3\times 10^8 :: 300000000
! 35000 :: 3.5\times 10^5
! 35000 :: 3.5
! 10^5 :: 10^{-5}
! 5 :: 1e999999999

# Percent
= 50\% :: 50%
= 50\% :: 50
= 50 :: 50\%
= 50\% :: 0.5
= 0.5 :: 50\%
= 50\% :: \frac{1}{2}
= 12.5\% :: 12.50\%
= 50\% :: 50\text{ percent}
= 50\% :: 50 percent
! 50\% :: 5\%
! 50 :: 0.5
! 50\% :: 5000
! 50\% :: 0.5\%

# Units
= 5 :: 5 cm
= 5 :: 5\text{ cm}
= 5 :: 5\,\mathrm{cm}
= 5\text{ cm} :: 5
= 5 \text{ cm} :: 5 centimeters
= 5\text{ cm}^2 :: 5 cm²
= 20 :: 20 square feet
= 20\text{ ft}^2 :: 20 square feet
= 12 :: \$12
= 12 :: 12 dollars
= \$12.50 :: 12.5
= 90^\circ :: 90
= 90 :: 90°
= 90^{\circ} :: 90 degrees
= 90^\circ :: 90\degree
= 7 :: 7 apples
= 7 \text{ apples} :: 7 apples
= 60 :: 60 km/h
= 60 \text{ mph} :: 60 miles per hour
= \frac{1}{2}\text{ hour} :: 0.5\text{ hours}
= 12\pi\text{ cm}^2 :: 12\pi
= 101_2 :: 101
= 101_2 :: 101_{2}
! 5\text{ cm} :: 5\text{ m}
! 5\text{ cm} :: 5\text{ cm}^2
! 5 :: 6 cm
! 7 apples :: 7 pears
! 101_2 :: 101_3
! 5t :: 5
! 5 :: 5t
! \text{cm} :: 5
= 11:30 :: 11:30
= 1:2 :: 2:4
! 11:30 :: 10:90
# two writings of one length: we do not convert
~= 1\text{ m} :: 100\text{ cm}
# nor degrees to radians
~= 90^\circ :: \frac{\pi}{2}

# Roots, constants, functions
= \sqrt{2} :: \sqrt2
= \sqrt{2} :: √2
= \sqrt{2} :: sqrt(2)
= \sqrt{2} :: 2^{1/2}
= \sqrt{8} :: 2\sqrt{2}
= \frac{\sqrt{2}}{2} :: \frac{1}{\sqrt{2}}
= \frac{\sqrt{2}}{2} :: sqrt(2)/2
= \sqrt[3]{8} :: 2
= 1+\sqrt{3} :: \sqrt{3}+1
= \sqrt{2} :: 1.414214
= 2\pi :: 2pi
= 2\pi :: 2π
= 2\pi :: 2*pi
= \frac{\pi}{4} :: \pi/4
= e^2 :: e^{2}
= \ln 2 :: \ln(2)
= \log_2 8 :: 3
= \sin 30^\circ :: \frac{1}{2}
= \cos\frac{\pi}{3} :: 0.5
= \infty :: ∞
= -\infty :: -infinity
= |{-3}| :: 3
! \sqrt{2} :: \sqrt{3}
! \sqrt{2} :: 1.41
! \sqrt{2} :: -\sqrt{2}
! \pi :: 3.14
! \pi :: 3
! 2\pi :: \pi
! e^2 :: 2e
! \infty :: -\infty
! \ln 2 :: \log_{10} 2

# Expressions
= x^2-1 :: (x-1)(x+1)
= x^2-1 :: x**2 - 1
= x^{10} :: x^10
= 2x+1 :: 1+2x
= \frac{x+1}{2} :: 0.5x+0.5
= \frac{1}{x} :: x^{-1}
= xy :: yx
= n(n+1)/2 :: \frac{n^2+n}{2}
= a^2+2ab+b^2 :: (a+b)^2
= \sin^2 x :: 1-\cos^2 x
= 3+4i :: 4i + 3
= 2i :: (1+i)^2
= -1 :: i^2
= |x| :: \sqrt{x^2}
= \frac{a}{b} :: a/b
! x^2-1 :: x^2+1
! x^2 :: x^3
! x :: y
! 2x :: 2y
! x+y :: x-y
! x+y :: xy
! 3+4i :: 3-4i
! x :: 1
! 1 :: x
! 3 :: 3x
! x_1 :: x_2
! 2A :: 2a
! x+A :: x+a
= \sum_{k=1}^{10} k :: 55
= \int_0^1 x dx :: \frac{1}{2}
= \frac{\sqrt{3}}{2} :: \frac{\sqrt3}2
= \binom{n}{k} :: \frac{n!}{k!(n-k)!}
= k\pi, k\in\mathbb{Z} :: k\pi, k \in \mathbb{Z}
= \frac{1}{1+i} :: \frac{1-i}{2}
= 2^{1000} :: 4^{500}
! 2^{1000} :: 2^{1001}
# bars and arrows over letters are kept: \overline{AB} is a number of two digits elsewhere
~= \overline{AB} :: AB

# Equations
= 3 :: x=3
= x=3 :: 3
= x = 3 :: x=3
= x = \frac{1}{2} :: x=0.5
= 4 :: 2+2=4
= 12\pi :: S = 2\pi r h = 12\pi
= y=2x+1 :: 2x+1
= y=2x+1 :: y = 1+2x
= 2x+3y=6 :: 4x+6y=12
= 2x+3y=6 :: 2x+3y-6=0
= f(x)=x^2 :: x^2
= x^2+y^2=1 :: y^2+x^2=1
= 5 :: AB = 5
= x_1 = 5 :: x_{1}=5
= \angle A=30^\circ :: 30
= \sqrt{2} :: \approx 1.414214
= x^2+2x+1=0 :: (x+1)^2=0
! x=2 :: x=1=2
! 5 :: 5=6
! 6 :: 6\ne 5
! x=3 :: y=3
! x=3 :: x=4
! 3 :: x=4
! 4 :: 5=4
! 2x+3y=6 :: 6
! 2x+3y=6 :: 2x+3y=7
! y=2x+1 :: y=2x
! x=3 :: x>3

# Lists and sets
= 1, 2 :: 2, 1
= 1,2 :: 1 and 2
= 1,2 :: 1 \text{ or } 2
= 1,2 :: 1; 2
= 1,2 :: x=1, x=2
= x=1, x=2 :: x = 2 \text{ or } x = 1
= 1,2 :: x=1,2
= \{1,2\} :: \{2, 1\}
= \{1,2\} :: 1, 2
= \{1,2\} :: \left\{1,2\right\}
= \{1,2\} :: \{1,2,2\}
= \{\frac{1}{2}, 3\} :: \{3, 0.5\}
= 1, -1 :: \pm 1
= \pm 2 :: 2, -2
= 2\pm\sqrt3 :: 2-\sqrt{3},2+\sqrt{3}
= x=1, y=2 :: y=2, x=1
= \emptyset :: \varnothing
= \emptyset :: \{\}
= \emptyset :: ∅
= \{5\} :: 5
= 5,-5 :: x=5 \text{ or } x=-5
= \text{2 and 3} :: 2,3
= 3.5 :: \frac{7}{2} \text{ or } 3.5
= \{x \mid x>3\} :: x>3
! 5 :: \text{5 or 6}
! 5 :: 5\text{ or maybe }6
! 5 :: 5 6
! 5 :: 5 \quad 6
! 5 :: 5 to 6
! 5 :: 5-6
! 5 :: 5\\6
! 5 :: 5...6
! 5 :: 5 vs 6
! A :: A or B
! A :: A/B
! A :: ABCD
! \text{Yes} :: \text{Yes or no}
! 1 :: 1 or 2
! 2 :: x=1, x=2
! 1,2 :: 1
! 1,2 :: 1,2,3
! 1,2,3 :: 1,2
! 1,2 :: 1,3
! 1,1 :: 1,2
! \pm 2 :: 2
! 2 :: \pm 2
! x=1, y=2 :: x=2, y=1
! \emptyset :: 0
! \{1,2\} :: \{1,3\}
! 3 :: 1, 2, 3, 4, 5

# Tuples and intervals
= (1,2) :: (1, 2)
= (1,2) :: \left(1,2\right)
= (1,2) :: \langle 1,2\rangle
= (\frac12,\sqrt8) :: (0.5, 2\sqrt{2})
= (1,2,3) :: (1,2,3)
= (1,2) :: 1,2
= (x,y)=(1,2) :: (1,2)
= (1,2),(3,4) :: (3,4),(1,2)
= (a,b)=(2,3) :: a=2, b=3
! (a,b)=(2,3) :: a=3, b=2
= [1,2) :: \left[1,2\right)
= [0,1] :: [0, 1.0]
= (-\infty,3) :: (-∞, 3)
= (-\infty,3)\cup(5,\infty) :: (5,\infty) \cup (-\infty,3)
= [0,2] :: [0,1]\cup[1,2]
= (3,\infty) :: x>3
= x>3 :: (3,\infty)
= x>3 :: 3<x
= x \ge 3 :: x \geq 3
= 1<x\le 5 :: (1,5]
= 1<x\le 5 :: x\in(1,5]
= [1,2] :: x \in [1,2]
= x\ne 2 :: (-\infty,2)\cup(2,\infty)
! (1,2) :: (2,1)
! (2,1) :: (3,1)
! (1,2) :: 2,1
! (1,2) :: \{1,2\}
! (1,2) :: [1,2]
! [1,2) :: (1,2]
! (1,2) :: (1,2,3)
! (1,2) :: 1
! 1 :: (1,2)
! (1,2),(3,4) :: (1,2)
! (3,\infty) :: (3,5)
! (3,\infty) :: [3,\infty)
# two conditions at once are a list to us, not an intersection
~= (-\infty,-2)\cup(-2,2) :: x<2, x\ne -2
! x>3 :: x\ge 3
! x>3 :: x<3
! x>2 :: x>3
! (-\infty,3)\cup(5,\infty) :: (-\infty,3)
! (-\infty,3)\cup(5,\infty) :: (-\infty,3),(5,\infty)

# Matrices and vectors
= \begin{pmatrix}1&2\\3&4\end{pmatrix} :: \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}
= \begin{pmatrix}1&2\\3&4\end{pmatrix} :: \begin{bmatrix}1&2\\3&4\end{bmatrix}
= \begin{pmatrix}0.5\\3\end{pmatrix} :: \begin{pmatrix}\frac{1}{2}\\3\end{pmatrix}
= \begin{pmatrix}1\\2\end{pmatrix} :: \left(\begin{matrix}1\\2\end{matrix}\right)
! \begin{pmatrix}1&2\\3&4\end{pmatrix} :: \begin{pmatrix}1&3\\2&4\end{pmatrix}
! \begin{pmatrix}1&2\\3&4\end{pmatrix} :: \begin{pmatrix}1&2\end{pmatrix}
! \begin{pmatrix}1\\2\end{pmatrix} :: \begin{pmatrix}1&2\end{pmatrix}
! \begin{pmatrix}1\\2\end{pmatrix} :: 1,2
# a column vector is not recognized as the tuple of its coordinates
~= \begin{pmatrix}1\\2\end{pmatrix} :: (1,2)

# Words and choices
= A :: (A)
= A :: \text{A}
= \text{(B)} :: B
= C :: \textbf{(C)}
= \text{Evelyn} :: Evelyn
= \text{even} :: \text{Even}
= Monday :: monday
= \text{no solution} :: no solution
= yes :: Yes.
! A :: B
! A :: A, B
! (A) :: (B)
! Monday :: Madnoy
! \text{odd} :: \text{even}
! \text{listen} :: \text{silent}
! yes :: no
! 5 :: five
! Monday :: 1
! \text{no solution} :: 0

# Boxes and layout
= 7 :: \boxed{7}
= 7 :: \text{The value is } \boxed{7}
! 2 :: 1, \boxed{2}
! 7 :: \boxed{7}, \boxed{8}
= \frac{1}{2} :: \\frac{1}{2}
= 5 :: \displaystyle 5
= 1{,}5 :: 1,5

# Gold answers without a meaning
? ? :: 5
? ? :: ?
? \frac{1}{0} :: \frac{1}{0}
? \frac{1}{0} :: 1
? foo( :: foo(
? 5 + :: 5 +
? x= :: x=
? = :: =
? \frac{1}{ :: 1
? (1, ?) :: (1, 2)
? ?, 2 :: 1, 2
? $$ :: 5
"""


def _rows():
    known = ""
    for line in TABLE.splitlines():
        mark, _, pair = line.partition(" ")
        if mark == "#":
            known = pair
        elif mark:
            gold, answer = (side.strip() for side in pair.split(" :: "))
            yield mark, gold, answer, known


ROWS = list(_rows())
OUTCOMES = {"=": Outcome.RIGHT, "!": Outcome.WRONG, "?": Outcome.ERROR}


@pytest.fixture(scope="module")
def judgements():
    with VerifierPool(num_workers=2, time_limit=20) as pool:
        return pool.check([Check("math", gold, rf"Hence it is \boxed{{{answer}}}.") for _, gold, answer, _ in ROWS])


def _parameters():
    for number, (mark, gold, answer, known) in enumerate(ROWS):
        marks = [pytest.mark.xfail(strict=True, reason=known)] if mark.startswith("~") else []
        yield pytest.param(number, id=f"{number} {gold} {mark} {answer}", marks=marks)


@pytest.mark.parametrize("number", list(_parameters()))
def test_pair(number, judgements):
    mark, gold, answer, _ = ROWS[number]
    judgement = judgements[number]
    assert judgement.outcome == OUTCOMES[mark[-1]], f"{gold} {mark} {answer}: {judgement}"
    assert bool(judgement.reason) == (judgement.outcome == Outcome.ERROR)


def test_the_table_is_as_large_as_promised():
    assert len({(gold, answer) for _, gold, answer, _ in ROWS}) == len(ROWS) >= 150


def test_gold_answers_verify_against_themselves():
    """All gold answers of the table that mean something, numbers and words alike."""
    golds = list(dict.fromkeys(gold for mark, gold, _, _ in ROWS if mark != "?"))
    bad = list(dict.fromkeys(gold for mark, gold, _, _ in ROWS if mark == "?"))
    with VerifierPool(num_workers=2, time_limit=20) as pool:
        found = pool.check_gold([("math", gold) for gold in golds + bad])
    assert [(golds + bad)[row] for row in found] == bad
